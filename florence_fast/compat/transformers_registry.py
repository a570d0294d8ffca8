"""Our dual encoders as Hugging Face's ``AutoModel``, ``AutoImageProcessor`` and ``AutoTokenizer``, without remote code.

transformers imports its parts when they are used, and its parts import each other: each registration here waits for one
module, asks for nothing that this has not imported, and is made by `florence_fast.on_import`, whichever of the packages
comes first. The model waits for a configuration of ours, since its class needs all of transformers' model code, which
nobody who wants a tokenizer should pay for.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path

from florence_fast.models import Florence


def register_with_transformers() -> list[str]:
    """Make transformers' Auto classes know the model type ``florence_fast``; once more changes nothing.

    ``import florence_fast`` has the same effect, before ``import transformers`` or after it.

    Returns:
        The classes that stand for it: configuration, image processor, model, tokenizer and processor.

    Raises:
        ImportError: transformers is not installed.

    >>> register_with_transformers()
    >>> model = transformers.AutoModel.from_pretrained("written/by/save_for_transformers")
    """
    _require_transformers()
    registrations = (register_config, register_image_processor, register_model, register_tokenizer, register_processor)
    return [register() for register in registrations]


def register_config() -> str:
    """Tell ``AutoConfig`` of our configuration, and return the name of its class."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from florence_fast.compat.transformers_config import FlorenceFastConfig

    AutoConfig.register(FlorenceFastConfig.model_type, FlorenceFastConfig, exist_ok=True)
    return FlorenceFastConfig.__name__


def register_image_processor() -> str:
    """Tell ``AutoImageProcessor`` of ours, and return the name of its class."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from florence_fast.compat.transformers_config import FlorenceFastConfig
    from florence_fast.compat.transformers_image_processor import FlorenceFastImageProcessor as OurProcessor

    # Until 4.40 there was one kind of image processor, and so another word for it.
    words = inspect.signature(AutoImageProcessor.register).parameters
    word = "slow_image_processor_class" if "slow_image_processor_class" in words else "image_processor_class"
    AutoImageProcessor.register(FlorenceFastConfig, **{word: OurProcessor}, exist_ok=True)
    return OurProcessor.__name__


def register_processor() -> str:
    """Tell ``AutoProcessor`` of ours, and return the name of its class."""
    from transformers.models.auto.processing_auto import AutoProcessor

    from florence_fast.compat.transformers_config import FlorenceFastConfig
    from florence_fast.compat.transformers_processor import FlorenceFastProcessor

    AutoProcessor.register(FlorenceFastConfig, FlorenceFastProcessor, exist_ok=True)
    return FlorenceFastProcessor.__name__


def register_model() -> str:
    """Tell ``AutoModel`` and its sister for zero-shot classification of our dual encoder; return its class's name."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForZeroShotImageClassification

    from florence_fast.compat.transformers_model import FlorenceFastModel

    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        auto.register(FlorenceFastModel.config_class, FlorenceFastModel, exist_ok=True)
    return FlorenceFastModel.__name__


def register_tokenizer() -> str:
    """Tell ``AutoTokenizer`` of ours, and return the name of its class."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from florence_fast.compat.transformers_config import FlorenceFastConfig
    from florence_fast.compat.transformers_tokenizer import FlorenceFastTokenizer

    AutoTokenizer.register(FlorenceFastConfig, slow_tokenizer_class=FlorenceFastTokenizer, exist_ok=True)
    return FlorenceFastTokenizer.__name__


def save_for_transformers(model: Florence, directory: str | os.PathLike[str]) -> Path:
    """Write a model where transformers' Auto classes find it, as `Florence.save_pretrained` does.

    Returns:
        The directory. `florence_fast.create_model(name, pretrained=directory/"model.safetensors")` reads the same file.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is no dual encoder.

    >>> save_for_transformers(ff.create_model("florence_nano", pretrained="artists"), "nano")
    """
    if not isinstance(model, Florence):
        raise TypeError(f"model must be a Florence, got {type(model).__name__}")
    _require_transformers()
    return model.save_pretrained(directory)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401 - so that nothing else's failure is taken for its absence
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install transformers") from error
