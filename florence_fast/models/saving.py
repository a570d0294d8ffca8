"""Writing a model's weights and configuration so that one file is enough to load it again, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file

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


class SavePretrained:
    """`save_pretrained` and `from_pretrained` of a model that is built from one ``config``."""

    config: Any

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``model.safetensors``, with the configuration inside, and the same as ``config.json``.

        Returns:
            The directory, which is made if need be. `create_model(name, pretrained=directory)` and
            ``pretrained=directory/model.safetensors`` load it again.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", CONFIG_KEY: format_json(config)}
        with replacing(directory / WEIGHTS_NAME) as beside:
            save_file(tensors, beside, metadata=metadata)
        write_json(directory / CONFIG_NAME, config)
        return directory

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
