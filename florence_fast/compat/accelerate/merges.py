"""Patch merges of every library on `florence_fast.ops`: the tokens of a cell side by side, normed and reduced.

V1 of Swin norms the 4C channels and reduces them (arXiv 2103.14030, section 3.1), V2 reduces and norms the result;
MONAI takes eight tokens together in 3-D. A merge is computed whole: its norm belongs to it, and not to those that
``norm`` of `accelerate` is for.

B batch · T D frames or depth · H W map height and width · C channels · C' channels of the result
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate import pieces
from florence_fast.models.layers import is_plain

SWIN_CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Row and column of each of the four tokens in their cell, in the order of Microsoft's code and of `ops`."""


def reasons(module: nn.Module) -> Iterator[str]:
    """Say why a merge must keep its own forward; AttributeError if it has other parts."""
    norm, reduction = module.norm, module.reduction
    if type(norm) is not nn.LayerNorm:
        yield f"merged tokens must be normalised by a plain nn.LayerNorm, got {type(norm).__name__}"
    yield from pieces.linear_reasons("merged tokens", reduction)
    if not is_plain(norm, reduction, kinds=(type(norm), type(reduction))):
        yield "its norm or its reduction has hooks or another forward"


def side_by_side(x: Tensor, corners: Sequence[tuple[int, ...]]) -> Tensor:
    """Lay the tokens of each cell side by side: (..., H, W, C) to (..., H/2, W/2, len(corners) * C), rounded up.

    Cells have an edge of two along as many of the last axes as a corner has numbers.
    """
    axes = len(corners[0])
    missing = [side % 2 for side in x.shape[-1 - axes : -1]]
    if any(missing):
        x = F.pad(x, (0, 0, *(pad for by in reversed(missing) for pad in (0, by))))
    return torch.cat([x[(..., *(slice(first, None, 2) for first in corner), slice(None))] for corner in corners], -1)


def norm_then_reduce(module: nn.Module, x: Tensor, corners: Sequence[tuple[int, ...]] = SWIN_CORNERS) -> Tensor | None:
    """Merge as V1 does: (B, [T,] H, W, C) to (B, [T,] H/2, W/2, C'); None if norm or reduction has to be called."""
    norm, reduction = module.norm, module.reduction
    if not _are_plain(norm, reduction):
        return None
    channels = x.shape[-1]
    as_the_op = corners == SWIN_CORNERS and tuple(reduction.weight.shape) == (2 * channels, 4 * channels)
    if as_the_op and norm.weight is not None and norm.bias is not None and reduction.bias is None:
        return ops.patch_merging(x, norm.weight, norm.bias, reduction.weight, eps=norm.eps)
    rows = ops.layer_norm(side_by_side(x, corners), norm.weight, norm.bias, eps=norm.eps)
    return ops.linear(rows, reduction.weight, reduction.bias)


def reduce_then_norm(module: nn.Module, x: Tensor) -> Tensor | None:
    """Merge as V2 does: (..., H, W, C) to (..., H/2, W/2, C'); None if norm or reduction has to be called."""
    norm, reduction = module.norm, module.reduction
    if not _are_plain(norm, reduction):
        return None
    rows = ops.linear(side_by_side(x, SWIN_CORNERS), reduction.weight, reduction.bias)
    return ops.layer_norm(rows, norm.weight, norm.bias, eps=norm.eps)


def _are_plain(norm: nn.Module, reduction: nn.Module) -> bool:
    return is_plain(norm, kinds=(nn.LayerNorm,)) and is_plain(reduction, kinds=(nn.Linear,))
