"""Find weights by tag, directory or file, and load them. Partial loads and NaN are errors."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from florence_fast.errors import unknown
from florence_fast.models.florence import Florence
from florence_fast.models.layers import resize_bias_table
from florence_fast.models.layouts import State
from florence_fast.models.reading import PICKLED, read_checkpoint
from florence_fast.models.swin_block import WindowAttention
from florence_fast.models.tower import ImageTower

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "weights"


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """Return (model, tag) of the weights that come with the package; ``as_str`` gives ``"model:tag"``."""
    pairs = [cast("tuple[str, str]", tuple(file.stem.rsplit("-", 1))) for file in sorted(SHIPPED.glob("*.safetensors"))]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def find_pretrained(model_name: str, pretrained: str | os.PathLike[str]) -> Path:
    """Resolve what ``pretrained=`` takes: a path that exists, or a tag of ``model_name``.

    Raises:
        FileNotFoundError: it looks like a path and nothing is there.
        ValueError: no such tag; the message holds the tags there are.
    """
    tags = [tag for name, tag in list_pretrained() if name == model_name]
    there = f"the tags of {model_name}: {', '.join(tags)}" if tags else f"{model_name} comes without weights"
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained} does not say which weights: give a tag, a folder or a file; {there}")
    if not isinstance(pretrained, str | os.PathLike):
        raise TypeError(f"pretrained must be a tag or a path, got {type(pretrained).__name__}; {there}")
    path = Path(pretrained)
    shipped = SHIPPED / f"{model_name}-{pretrained}.safetensors"
    if isinstance(pretrained, str) and os.sep not in pretrained and shipped.is_file():
        return shipped
    if path.exists():
        return path
    if isinstance(pretrained, os.PathLike) or len(path.parts) > 1 or path.suffix in (".safetensors", *PICKLED):
        raise FileNotFoundError(f"pretrained={str(pretrained)!r}: no such file or directory")
    if not tags:
        raise ValueError(
            f"unknown pretrained tag of {model_name} {pretrained!r}: it comes without weights; give a path"
        )
    raise unknown(f"pretrained tag of {model_name}", pretrained, tags)


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
        ValueError: not one name matches; or, if strict, some are missing or left over; or shapes differ; or a tensor
            holds integers, NaN or infinity.
    """
    matching, missing = fit_state(model, state, strict=strict, source=source)
    model.load_state_dict(matching, strict=False)
    return missing


def fit_state(
    model: Florence | ImageTower, state: State, *, strict: bool = True, source: str = "state"
) -> tuple[State, list[str]]:
    """Return what `load_state` would load and the names that it would leave; the model may be on the meta device."""
    matching, missing, unexpected = match_state(model, state, source=source)
    left_out_head = [name for name in missing if name.startswith("head.")]
    drawn = [name for name in missing if name.startswith("head.") or name == "logit_bias"]
    if strict and (unexpected or len(missing) > len(drawn)):
        raise ValueError(
            f"{source} does not fit: missing {_first(missing)}; unexpected {_first(unexpected)}; "
            "strict=False loads the rest"
        )
    if left_out_head:
        log.warning("%s holds no classifier for this model: it keeps the weights it was drawn with", source)
    return matching, missing


def match_state(
    model: Florence | ImageTower, state: State, *, source: str = "state"
) -> tuple[State, list[str], list[str]]:
    """Bring ``state`` to the shapes that ``model`` wants, and compare names; the model may be on the meta device.

    Returns:
        What fits, name -> tensor; the names of the model that are missing; the names of ``state`` that are left over.

    Raises:
        ValueError: not one name matches; shapes differ; a tensor is not of a floating dtype, or holds NaN or infinity.
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
    for name, tensor in matching.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} of {source} must hold floating-point numbers, got {tensor.dtype}")
        if not _is_finite(tensor):
            raise ValueError(f"{name} of {source} holds NaN or infinite numbers: these weights are of no use")
    return matching, [name for name in own if name not in state], [name for name in state if name not in own]


def _fit(model: nn.Module, own: State, state: State) -> State:
    """Bring tensors that may differ by design to the shapes that the model wants."""
    if isinstance(model, ImageTower) and any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    for name, module in model.named_modules():
        key = f"{name}.relative_position_bias_table"
        if isinstance(module, WindowAttention) and _has_shape(state.get(key), None, module.num_heads):
            try:
                state[key] = resize_bias_table(state[key], (module.window_size, module.window_size))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    key = "text.positional_embedding"
    if key in own and _has_shape(state.get(key), None, own[key].shape[1]):
        state[key] = state[key][: len(own[key])]
    head = state.get("head.weight")
    if (
        isinstance(model, ImageTower)
        and head is not None
        and _has_shape(head, None, model.num_features)
        and len(head) != model.config.num_classes
    ):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return state


def _has_shape(tensor: Tensor | None, *shape: int | None) -> bool:
    """Say whether there is a tensor of this shape; None stands for any size from 1 on."""
    if tensor is None or tensor.ndim != len(shape):
        return False
    return all(wanted in (None, size) and size > 0 for size, wanted in zip(tensor.shape, shape, strict=True))


def _is_finite(tensor: Tensor) -> bool:
    """Say whether every number is finite; a sum in float64 needs no memory, and is not finite if one of them is not."""
    if tensor.is_meta:
        return True
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no sums
    return math.isfinite(tensor.sum(dtype=torch.float64)) or bool(torch.isfinite(tensor).all())


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
