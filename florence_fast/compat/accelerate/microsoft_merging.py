"""The merges of Microsoft's own Swin on `florence_fast.ops`, told by their parts as the blocks in `microsoft_swin` are.

There are two here as well: the one for classification knows its map (``input_resolution``) and takes even ones, the
one for detection is told the map with every call and completes an odd one. A norm of 4C channels is that of V1,
before the reduction; a norm as wide as the result is that of V2, after it. A copy of a merge is tried before it is
swapped: it may lay its four tokens in another order.

B batch · H W map height and width · C channels
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from florence_fast.compat.accelerate import merges, microsoft_swin, pieces
from florence_fast.compat.accelerate import swin_block as swin
from florence_fast.compat.accelerate.options import Options

LOOKS_FOR = "merges laid out as Microsoft's PatchMerging"


def resolution_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for the forward of the merge for classification: (B, H*W, C) to (B, H/2*W/2, 2C)."""
    size = tuple(merging.input_resolution)
    # what is no such map, or odd, is theirs to refuse
    merged = None if any(side % 2 for side in size) else _merge(merging, x, size)
    return type(merging).forward(merging, x) if merged is None else merged


def told_forward(merging: nn.Module, x: Tensor, H: int, W: int) -> Tensor:
    """Stand in for the forward of the merge for detection: (B, H*W, C) to (B, H/2*W/2, 2C), rounded up."""
    merged = _merge(merging, x, (H, W))
    return type(merging).forward(merging, x, H, W) if merged is None else merged


FORWARDS = {resolution_forward, told_forward}


def _merge(merging: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor | None:
    if swin.is_traced(x) or x.ndim != 3 or x.shape[1] != size[0] * size[1]:
        return None
    merge = merges.reduce_then_norm if _norms_at_the_end(merging) else merges.norm_then_reduce
    merged = merge(merging, x.unflatten(1, size))
    return None if merged is None else merged.flatten(1, 2)


def _norms_at_the_end(merging: nn.Module) -> bool:
    return tuple(merging.norm.normalized_shape) == (merging.reduction.out_features,)


def kind(module: nn.Module) -> str | None:
    """Name the merge if it has the parts of Microsoft's; None if this file does not know it."""
    children = {name for name, _ in module.named_children()}
    if microsoft_swin.is_of_a_library(module) or children != {"norm", "reduction"}:
        return None
    return f"Microsoft {type(module).__name__}" if _forward(module) is not None else None


def _forward(module: nn.Module) -> Callable[..., Tensor] | None:
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) == 1 and hasattr(module, "input_resolution"):
        return resolution_forward
    return told_forward if arguments[1:] == ("H", "W") else None


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a merge with a ``kind``, or the reason why none can."""
    forward = _forward(module)
    reason = pieces.switched_off(options, "merging") or next(merges.reasons(module), None)
    inputs = _trial_inputs if forward is resolution_forward else _told_trial_inputs
    return reason or microsoft_swin.trial(module, forward, inputs, "merge") or forward


def _trial_inputs(merging: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
    height, width = merging.input_resolution
    return (torch.randn(1, height * width, merging.reduction.in_features // 4, generator=generator),)


def _told_trial_inputs(merging: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
    height, width = 3, 5
    return torch.randn(1, height * width, merging.reduction.in_features // 4, generator=generator), height, width
