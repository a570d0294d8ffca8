"""Read weights from safetensors and pickled tensors. Pickled objects and truncated files are refused.

A file may come from a stranger. What is damaged, misshaped or of another kind is a ValueError that names the file.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from florence_fast.models.layouts import State, to_our_layout, unwrap
from florence_fast.models.saving import CONFIG_KEY, CONFIG_NAME, WEIGHTS_NAME, config_in
from florence_fast.strict_json import parse_json
from florence_fast.text_files import read_json

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_STEP = re.compile(r"step_(\d+)\.safetensors")  # as the trainer names its weights
_SAVE_TENSORS = "torch.save(torch.load(file, weights_only=False)['model'], 'tensors.pth')"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and the model's configuration as a dictionary if it has one."""

    path: Path
    state: State
    config: dict[str, Any] | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the header of a safetensors file says."""


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what `read_tensors` reads, and rename the tensors of a layout that `to_our_layout` knows.

    Raises:
        FileNotFoundError, ValueError: as `read_tensors`; or the layout lacks one of its tensors.
    """
    found = read_tensors(path)
    try:
        return replace(found, state=to_our_layout(found.state))
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a directory of `save_pretrained`, a safetensors file, or a ``.pth``/``.pt`` file of plain tensors.

    The folder of a training run stands for its newest weights.

    Returns:
        The tensors under the file's own names, less the wrappings of training scripts, on the CPU.

    Raises:
        FileNotFoundError: nothing is there, or the directory holds no ``model.safetensors`` and no run's weights.
        OSError: the file cannot be opened or read.
        ValueError: the file is damaged, of another kind, or holds pickled objects other than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    _check_file(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{path} must end in .safetensors or in one of {', '.join(PICKLED)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: 0 bytes")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the model's configuration that weights state, which takes no tensors; None where they state none.

    Args:
        path: as for `read_tensors`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `read_tensors`, except for damaged tensors.
    """
    path = Path(path)
    if path.is_dir():
        file = weights_in(path)
        return read_config(file) or _config_beside(file)
    _check_file(path)
    return _header(path)[0] if path.suffix == ".safetensors" else None


def holds_weights(path: Path) -> bool:
    """Say whether ``path`` is a folder of `save_pretrained` or of a training run, or a file named like weights."""
    if path.suffix in (".safetensors", *PICKLED):
        return True
    return path.is_dir() and ((path / WEIGHTS_NAME).is_file() or _newest_of_a_run(path) is not None)


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder of `save_pretrained` or of a training run.

    Raises:
        FileNotFoundError: it holds neither.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    if (newest := _newest_of_a_run(folder)) is not None:
        return newest
    names = sorted(p.name for p in folder.iterdir())[:8]
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS_NAME}, only {names}")


def _read_folder(path: Path) -> Checkpoint:
    file = weights_in(path)
    found = read_tensors(file)
    return found if found.config is not None else replace(found, config=_config_beside(file))


def _config_beside(file: Path) -> dict[str, Any] | None:
    """Return the configuration in the ``config.json`` beside the weights of `save_pretrained`."""
    beside = file.parent / CONFIG_NAME
    if file.name != WEIGHTS_NAME or not beside.is_file():
        return None
    return _config(read_json(beside), str(beside))


def _newest_of_a_run(folder: Path) -> Path | None:
    """Return the newest weights of a training run: those that its ``latest`` names, or else those of the last step."""
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = {int(match[1]): file for file in checkpoints.iterdir() if (match := _STEP.fullmatch(file.name))}
    pointer = checkpoints / "latest"
    if pointer.is_file():
        name = pointer.read_bytes().decode("utf-8", "replace").strip().removesuffix(".pt")
        if (match := _STEP.fullmatch(f"{name}.safetensors")) and int(match[1]) in steps:
            return steps[int(match[1])]
    return steps[max(steps)] if steps else None


def _config(values: Any, source: str) -> dict[str, Any]:
    """Return our configuration from parsed JSON."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold an object with named fields, got {type(values).__name__}")
    return config_in(values)


def _read_safetensors(path: Path) -> Checkpoint:
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return Checkpoint(path, _unwrapped(state, path), *_header(path))


def _header(path: Path) -> tuple[dict[str, Any] | None, Mapping[str, str]]:
    """Return the configuration in the header of a safetensors file, and all that the header says."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    source, config = f"{CONFIG_KEY} of {path}", metadata.get(CONFIG_KEY)
    return _config(parse_json(config, source), source) if config else None, metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; what is wrong with it is a ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what torch says about a dtype or a size that it does not have
        what = "a whole safetensors file" if isinstance(error, SafetensorError) else "a readable safetensors file"
        raise ValueError(f"{path} is not {what}: {error}") from error


def _read_pickled(path: Path) -> Checkpoint:
    try:
        # a Namespace holds a script's arguments and nothing else; timm's and UniCL's files carry one
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader answers damage with every kind of exception
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(
            f"{path} does not hold plain tensors alone, and nothing else is read: {_why(error)}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    return Checkpoint(path, _unwrapped(loaded, path), None)


def _why(error: Exception) -> str:
    """Say in one line why PyTorch read no tensors."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds a pickled {match[1]}, and pickles can run code. If you trust the file, save its tensors alone: "
            f"{_SAVE_TENSORS}"
        )
    first = (str(error).splitlines() or [""])[0]
    return f"the file is damaged ({type(error).__name__}: {first})"


def _unwrapped(loaded: Mapping[Any, Any], path: Path) -> State:
    try:
        return unwrap(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
