"""Our dual encoders as Hugging Face's ``AutoModel``, ``AutoImageProcessor`` and ``AutoTokenizer``, without remote code.

The classes are in transformers_classes.py, which is imported, with transformers, when this asks for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from florence_fast.models import Florence


def register_with_transformers() -> list[str]:
    """Make transformers' Auto classes know the model type ``florence_fast``; once more changes nothing.

    Returns:
        The classes that stand for it: configuration, model, image processor and tokenizer.

    Raises:
        ImportError: transformers is not installed.

    >>> register_with_transformers()
    >>> model = transformers.AutoModel.from_pretrained("written/by/save_for_transformers")
    """
    classes = _classes()
    import transformers

    config = classes.FlorenceFastConfig
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, classes.FlorenceFastModel, exist_ok=True)
    transformers.AutoImageProcessor.register(
        config, slow_image_processor_class=classes.FlorenceFastImageProcessor, exist_ok=True
    )
    transformers.AutoTokenizer.register(config, slow_tokenizer_class=classes.FlorenceFastTokenizer, exist_ok=True)
    return list(classes.__all__)


def save_for_transformers(model: Florence, directory: str | os.PathLike[str]) -> Path:
    """Write a model, its image processor and its tokenizer where transformers' Auto classes find them.

    Returns:
        The directory. `florence_fast.create_model(name, pretrained=directory/"model.safetensors")` reads the same file.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is no dual encoder.

    >>> save_for_transformers(ff.create_model("florence_nano", pretrained="artists"), "nano")
    """
    if not isinstance(model, Florence):
        raise TypeError(f"model must be a Florence, got {type(model).__name__}")
    classes, config = _classes(), model.config
    classes.FlorenceFastModel.from_florence(model).save_pretrained(directory)
    processor = {"size": config.image.img_size, "image_mean": config.image_mean, "image_std": config.image_std}
    classes.FlorenceFastImageProcessor(**processor).save_pretrained(directory)
    classes.FlorenceFastTokenizer(model_max_length=config.text.context_length).save_pretrained(directory)
    return Path(directory)


def _classes() -> ModuleType:
    try:
        import transformers  # noqa: F401 - so that nothing else's failure is taken for its absence
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install transformers") from error
    from florence_fast.compat import transformers_classes

    return transformers_classes
