"""Terminal output: tables and lines that show user input and file names literally."""

from rich.console import Console


def console(stderr: bool = False) -> Console:
    """Return a console that takes square brackets and colons for what they are, rather than for markup and emoji."""
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr)
