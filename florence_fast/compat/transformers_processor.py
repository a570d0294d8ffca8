"""``AutoProcessor`` of ``model_type: florence_fast``; see transformers_registry.py."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class FlorenceFastProcessor(ProcessorMixin):
    """The image processor and the tokenizer of a model together.

    >>> inputs = processor(text=["a cat", "a dog"], images=[image], padding="max_length", return_tensors="pt")
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - transformers' own form
    if hasattr(ProcessorMixin, "feature_extractor_class"):  # before transformers 5, which warns of such names
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(image_processor, tokenizer, **options)
