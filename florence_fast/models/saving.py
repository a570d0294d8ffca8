"""Writing a model's weights and configuration so that one file is enough to load it again, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file

CONFIG_KEY = "florence_fast_config"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_M = TypeVar("_M", bound="SavePretrained")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, bring it to the disk, and rename it there.

    Whatever goes wrong, ``path`` holds what it held before, and nothing unfinished stays behind.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        for target in (beside, path.parent):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
        metadata = {"format": "pt", CONFIG_KEY: json.dumps(config)}
        write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata=metadata))
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))
        return directory

    @classmethod
    def from_pretrained(cls: type[_M], path: str | os.PathLike[str], *, strict: bool = True) -> _M:
        """Build the model that a directory or file of `save_pretrained` describes, in fp32 on the CPU.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ValueError: the file holds no configuration, or that of another class of model.
        """
        from florence_fast.models.factory import build_model
        from florence_fast.models.pretrained import load_state, read_checkpoint
        from florence_fast.models.registry import config_from_dict

        checkpoint = read_checkpoint(path)
        if checkpoint.config is None:
            raise ValueError(f"{checkpoint.path} holds no {CONFIG_KEY}: build the model by name, with pretrained=path")
        config = config_from_dict(checkpoint.config)
        model = build_model(config)
        if not isinstance(model, cls):
            raise ValueError(f"{checkpoint.path} holds a {type(model).__name__}, not a {cls.__name__}")
        load_state(model, checkpoint.state, strict=strict, source=str(checkpoint.path))
        return model
