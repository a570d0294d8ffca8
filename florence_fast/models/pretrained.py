"""Reading weights: by tag, from a directory or from a file, without pickled objects, and never silently in part."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from florence_fast.errors import unknown
from florence_fast.models.florence import Florence
from florence_fast.models.layers import resize_bias_table
from florence_fast.models.layouts import State, to_our_layout, unwrap
from florence_fast.models.saving import CONFIG_KEY, CONFIG_NAME, WEIGHTS_NAME
from florence_fast.models.swin_block import WindowAttention
from florence_fast.models.tower import ImageTower
from florence_fast.strict_json import parse_json
from florence_fast.text_files import read_json

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "weights"
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and the model's configuration as a dictionary if it has one."""

    path: Path
    state: State
    config: dict[str, Any] | None


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """Return (model, tag) of the weights that come with the package; ``as_str`` gives ``"model:tag"``."""
    pairs = [tuple(file.stem.rsplit("-", 1)) for file in sorted(SHIPPED.glob("*.safetensors"))]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def find_pretrained(model_name: str, pretrained: str | os.PathLike[str]) -> Path:
    """Resolve what ``pretrained=`` takes: a path that exists, or a tag of ``model_name``.

    Raises:
        FileNotFoundError: it looks like a path and nothing is there.
        ValueError: no such tag; the message holds the tags there are.
    """
    path = Path(pretrained)
    shipped = SHIPPED / f"{model_name}-{pretrained}.safetensors"
    if isinstance(pretrained, str) and os.sep not in pretrained and shipped.is_file():
        return shipped
    if path.exists():
        return path
    if isinstance(pretrained, os.PathLike) or len(path.parts) > 1 or path.suffix in (".safetensors", *_PICKLED):
        raise FileNotFoundError(f"pretrained={str(pretrained)!r}: no such file or directory")
    raise unknown(
        f"pretrained tag of {model_name}", pretrained, [tag for name, tag in list_pretrained() if name == model_name]
    )


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what `read_tensors` reads, and rename the tensors of a layout that `to_our_layout` knows."""
    found = read_tensors(path)
    return Checkpoint(found.path, to_our_layout(found.state), found.config)


def read_tensors(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a directory of `save_pretrained`, a safetensors file, or a ``.pth``/``.pt`` file of plain tensors.

    Returns:
        The tensors under the file's own names, less the wrappings of training scripts.

    Raises:
        FileNotFoundError: nothing is there, or the directory holds no ``model.safetensors``.
        ValueError: the file is damaged, of another kind, or holds pickled objects other than tensors.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{path} holds no {WEIGHTS_NAME}, only {sorted(p.name for p in path.iterdir())[:8]}"
            )
        beside = path / CONFIG_NAME
        found = read_tensors(path / WEIGHTS_NAME)
        if found.config is None and beside.is_file():
            return Checkpoint(found.path, found.state, read_json(beside))
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLED:
        return _read_pickled(path)
    raise ValueError(f"{path} must end in .safetensors or in one of {', '.join(_PICKLED)}")


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            config = (file.metadata() or {}).get(CONFIG_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return Checkpoint(path, unwrap(state), parse_json(config, f"the configuration in {path}") if config else None)


def _read_pickled(path: Path) -> Checkpoint:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold plain tensors alone, and nothing else is read: {reason}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    return Checkpoint(path, unwrap(loaded), None)


def load_state(model: Florence | ImageTower, state: State, *, strict: bool = True, source: str = "state") -> list[str]:
    """Load tensors under our names into ``model``, whatever window and context they were trained with.

    Bias tables of another window are resized bicubically; positions beyond the context are left out; a dual encoder's
    image tower is found when ``model`` is a tower; a classifier of another number of classes is left out.

    Args:
        model: what to load into.
        state: name -> tensor, of any floating dtype.
        strict: raise when a name of the model is missing or one of ``state`` is not used; the shapes of what matches
            must agree in any case.
        source: what messages call the weights.

    Returns:
        The names of parameters that kept their values.

    Raises:
        ValueError: not one name matches; or, if strict, some are missing or left over; or shapes differ.
    """
    matching, missing, unexpected = match_state(model, state, source=source)
    left_out_head = [name for name in missing if name.startswith("head.")]
    if strict and (unexpected or len(missing) > len(left_out_head)):
        raise ValueError(
            f"{source} does not fit: missing {_first(missing)}; unexpected {_first(unexpected)}; "
            "strict=False loads the rest"
        )
    if left_out_head:
        log.warning("%s holds no classifier for this model: it keeps the weights it was drawn with", source)
    model.load_state_dict(matching, strict=False)
    return missing


def match_state(
    model: Florence | ImageTower, state: State, *, source: str = "state"
) -> tuple[State, list[str], list[str]]:
    """Bring ``state`` to the shapes that ``model`` wants, and compare names; the model may be on the meta device.

    Returns:
        What fits, name -> tensor; the names of the model that are missing; the names of ``state`` that are left over.

    Raises:
        ValueError: not one name matches, or shapes differ.
    """
    own = model.state_dict()
    state = _fit(model, own, dict(state))
    matching = {name: state[name] for name in own if name in state}
    if not matching:
        raise ValueError(f"no name in {source} belongs to this model: it holds {_first(state)}, wanted {_first(own)}")
    wrong = [
        f"{k} {tuple(t.shape)}, wanted {tuple(own[k].shape)}" for k, t in matching.items() if t.shape != own[k].shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors of {source} have another shape: {'; '.join(wrong[:4])}")
    return matching, [name for name in own if name not in state], [name for name in state if name not in own]


def _fit(model: nn.Module, own: State, state: State) -> State:
    """Bring tensors that may differ by design to the shapes that the model wants."""
    if isinstance(model, ImageTower) and any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    for name, module in model.named_modules():
        key = f"{name}.relative_position_bias_table"
        if isinstance(module, WindowAttention) and key in state and state[key].shape[1] == module.num_heads:
            state[key] = resize_bias_table(state[key], (module.window_size, module.window_size))
    key = "text.positional_embedding"
    if key in own and key in state:
        state[key] = state[key][: len(own[key])]
    head = state.get("head.weight")
    if isinstance(model, ImageTower) and head is not None and len(head) != model.config.num_classes:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return state


def _first(names: Any, count: int = 4) -> str:
    names = list(names)
    more = f", ... {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) + more) or "nothing"


def load_checkpoint(
    model: Florence | ImageTower,
    checkpoint_path: str | os.PathLike[str],
    strict: bool = True,
    weights_only: bool = True,
) -> list[str]:
    """Load a file or directory into an existing model (open_clip's name); see `read_checkpoint` and `load_state`.

    Raises:
        ValueError: ``weights_only`` is False: pickled objects can run code and are never read.
    """
    if not weights_only:
        raise ValueError("weights_only=False is refused: pickled objects can run code; save the tensors alone")
    checkpoint = read_checkpoint(checkpoint_path)
    return load_state(model, checkpoint.state, strict=strict, source=str(checkpoint.path))
