"""``AutoProcessor`` of ``model_type: florence_fast``; see transformers_registry.py."""

from __future__ import annotations

from transformers import ProcessorMixin


class FlorenceFastProcessor(ProcessorMixin):
    """The image processor and the tokenizer of a model together.

    >>> inputs = processor(text=["a cat", "a dog"], images=[image], padding="max_length", return_tensors="pt")
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - transformers' own form
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
