"""Write a model's weights and configuration to one file, atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import save_file
from torch import nn

from florence_fast.files import replacing, write_json
from florence_fast.strict_json import format_json

CONFIG_KEY = "florence_fast_config"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MODEL_TYPE = "florence_fast"
"""transformers' word for our dual encoders."""

_M = TypeVar("_M", bound="SavePretrained")


def config_in(values: dict[str, Any]) -> dict[str, Any]:
    """Return our configuration from the content of a ``config.json``, whether or not transformers reads it too."""
    return values["florence"] if values.get("model_type") == MODEL_TYPE and "florence" in values else values


def files_for_transformers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files, by name, from which transformers' Auto classes build a dual encoder of ours.

    transformers need not be installed to write them.
    """
    image_processor = {
        "image_processor_type": "FlorenceFastImageProcessor",
        "processor_class": "FlorenceFastProcessor",
        "size": config["image"]["img_size"],
        **{name: config[name] for name in ("image_mean", "image_std", "resize_mode", "interpolation")},
    }
    return {
        CONFIG_NAME: {"architectures": ["FlorenceFastModel"], "model_type": MODEL_TYPE, "florence": config},
        "preprocessor_config.json": image_processor,
        "tokenizer_config.json": {
            "tokenizer_class": "FlorenceFastTokenizer",
            "processor_class": "FlorenceFastProcessor",
            "model_max_length": config["text"]["context_length"],
        },
    }


class _Folder:
    """What huggingface_hub's mixin uploads: an object that can write itself into a folder."""

    def __init__(self, model: SavePretrained) -> None:
        self.model = model

    def save_pretrained(self, save_directory: Path, **_: Any) -> None:
        """Write the model's files; the mixin's own words for a configuration and a card are of no use here."""
        self.model.save_pretrained(save_directory)


class SavePretrained:
    """`save_pretrained`, `push_to_hub` and `from_pretrained` of a model that is built from one ``config``."""

    config: Any

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``model.safetensors``, with the configuration inside, and ``config.json``.

        A dual encoder is also written for transformers' AutoModel, AutoProcessor, AutoTokenizer and
        ``pipeline("zero-shot-image-classification")``, which read it once ``florence_fast`` is imported.

        Returns:
            The directory, which is made if need be. `create_model(name, pretrained=directory)` and
            ``pretrained=directory/model.safetensors`` load it again.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict()
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in cast(nn.Module, self).state_dict().items()
        }
        metadata = {"format": "pt", CONFIG_KEY: format_json(config)}
        with replacing(directory / WEIGHTS_NAME) as beside:
            save_file(tensors, beside, metadata=metadata)
        is_dual = "text" in config
        for name, values in (files_for_transformers(config) if is_dual else {CONFIG_NAME: config}).items():
            write_json(directory / name, values)
        return directory

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what `save_pretrained` writes to a repository of Hugging Face's hub.

        Args:
            repo_id: ``"user/name"``; the repository is made if need be.
            options: those of ``huggingface_hub.ModelHubMixin.push_to_hub``: commit_message, private, token, branch,
                create_pr, allow_patterns, ignore_patterns, delete_patterns.

        Returns:
            The commit, as huggingface_hub describes it.

        >>> model.push_to_hub("user/florence-nano", private=True)
        """
        from huggingface_hub import ModelHubMixin

        return ModelHubMixin.push_to_hub(cast(Any, _Folder(self)), repo_id, **options)

    @classmethod
    def from_pretrained(cls: type[_M], path: str | os.PathLike[str], *, strict: bool = True) -> _M:
        """Build the model that a directory or file of `save_pretrained` describes, in fp32 on the CPU.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ValueError: the file holds no configuration, or that of another class of model.
        """
        from florence_fast.models.factory import build_with
        from florence_fast.models.reading import read_checkpoint
        from florence_fast.models.registry import config_from_dict

        checkpoint = read_checkpoint(path)
        if checkpoint.config is None:
            raise ValueError(f"{checkpoint.path} holds no {CONFIG_KEY}: build the model by name, with pretrained=path")
        model = build_with(config_from_dict(checkpoint.config), checkpoint, strict)
        if not isinstance(model, cls):
            raise ValueError(f"{checkpoint.path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model
