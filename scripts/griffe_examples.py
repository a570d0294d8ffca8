"""An extension of griffe, which reads the docstrings for docs/reference: `>>>` lines become a section of examples."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts a heading before the example that ends a docstring, so that it is shown as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is None:
            return
        text, mark, example = obj.docstring.value.partition("\n\n>>> ")
        if mark:
            indented = "\n".join(f"    {line}" if line else "" for line in f">>> {example}".splitlines())
            obj.docstring.value = f"{text}\n\nExamples:\n{indented}"
