"""The geometry of windows on a map, written once: how a map is cut, who may see whom, which offset reads which bias.

Letters: B batch · C channels · M windows of one map · N tokens in one window · h heads · d head dim.
A "size" is a tuple per axis, (H, W) or (T, H, W).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]

MAX_LOG_SCALE = math.log(100.0)
"""Swin V2 multiplies the cosine of two tokens by at most 100."""


def keeps_log_sum_exp(window_size: Sequence[int]) -> bool:
    """Say whether the kernels keep a number a row for their backward: a whole row of scores is in registers up to 64.

    The window that was asked for decides, not the map, so that a compiled function holds for every map.
    """
    return math.prod(window_size) > 64


@dataclass(frozen=True)
class Cut:
    """A map of ``size`` cut into ``grid`` windows of ``window``, after a cyclic shift by ``shift``; all per axis."""

    size: Size
    window: Size
    grid: Size
    shift: Size

    @property
    def padded(self) -> Size:
        return tuple(g * w for g, w in zip(self.grid, self.window, strict=True))

    @property
    def num_windows(self) -> int:
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.window)

    @property
    def may_have_pads(self) -> bool:
        return has_unknown(self.size) or self.padded != self.size

    @property
    def may_shift(self) -> bool:
        return has_unknown(self.shift) or any(self.shift)


def has_unknown(sizes: Sequence[int]) -> bool:
    """Say whether a model is being exported for other sizes as well.

    Its graph must then hold for all of them, so that nothing is decided by these: what may be needed is done, be it to
    pad or to roll by nothing.
    """
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def if_longer(shift: int, size: int, window: int) -> int:
    """Give ``shift`` for an axis longer than the window, else 0; by arithmetic alone where the size is not known."""
    if has_unknown((size,)):
        return shift * torch.sym_min(torch.sym_max(size - window, 0), 1)  # pyright: ignore[reportReturnType]
    return shift if size > window else 0


def cut_map(size: Size, window_size: Size, shift_size: Size) -> Cut:
    """Cut a map. On an axis no longer than the window, the window shrinks to the map and nothing is shifted."""
    window, grid = window_and_grid(size, window_size)
    shift = tuple(map(if_longer, shift_size, size, window_size))
    return Cut(tuple(size), window, grid, shift)


def window_and_grid(size: Size, window_size: Size) -> tuple[Size, Size]:
    """Give the window, no longer than the map, and how many fit; without a guard on symbolic sizes."""
    window: Any = tuple(torch.sym_min(s, w) for s, w in zip(size, window_size, strict=True))
    return window, tuple((s + w - 1) // w for s, w in zip(size, window, strict=True))


def partition(
    x: Tensor, cut: Cut, parts: int, num_heads: int, dtype: torch.dtype, fill: Tensor | None = None
) -> Tensor:
    """Cut (B, *size, parts*h*d) into (parts, B*M, h, N, d); pad tokens hold ``fill`` (parts*h*d), zeros without it."""
    axes = len(cut.size)
    batch, head_dim = x.shape[0], x.shape[-1] // (parts * num_heads)
    if cut.may_have_pads:
        x = _pad(x, cut, fill)
    if cut.may_shift:
        x = _roll(x, cut, -1)
    x = x.reshape(batch, *chain(*zip(cut.grid, cut.window, strict=True)), parts, num_heads, head_dim)
    grid_dims, window_dims = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    x = x.permute(2 * axes + 1, 0, *grid_dims, 2 * axes + 2, *window_dims, 2 * axes + 3)
    x = _settled(x.to(dtype, memory_format=torch.contiguous_format))
    return x.reshape(parts, batch * cut.num_windows, num_heads, cut.num_tokens, head_dim)


def merge(x: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    """Undo ``partition``, pad tokens included: (parts, B*M, h, N, d) to (B, *padded, parts*h*d)."""
    axes = len(cut.size)
    parts, rows, num_heads, _, head_dim = x.shape
    batch = rows // cut.num_windows
    x = x.view(parts, batch, *cut.grid, num_heads, *cut.window, head_dim)
    grid_dims, window_dims = range(2, axes + 2), range(axes + 3, 2 * axes + 3)
    x = x.permute(1, *chain(*zip(grid_dims, window_dims, strict=True)), 0, axes + 2, 2 * axes + 3)
    x = _settled(x.to(dtype, memory_format=torch.contiguous_format))
    x = x.reshape(batch, *cut.padded, parts * num_heads * head_dim)
    return _roll(x, cut, 1) if cut.may_shift else x


def crop(x: Tensor, cut: Cut) -> Tensor:
    """Drop the pad tokens: (B, *padded, C) to a contiguous (B, *size, C)."""
    return _settled(x[(slice(None), *map(slice, cut.size))]).contiguous()


def is_pad(cut: Cut, device: torch.device) -> Tensor:
    """Say which tokens of the padded map are pads: (*padded, 1) bool."""
    pads = torch.ones(*cut.padded, 1, dtype=torch.bool, device=device)
    pads[tuple(map(slice, cut.size))] = False
    return pads


def blocked_pairs(cut: Cut, cyclic: Sequence[int], mask_pads: bool, device: torch.device) -> Tensor | None:
    """Say which pairs of tokens of a window may not see each other: (M, N, N) bool, or None when all may.

    Tokens see each other when they lie in the same region. A region ends at the map's seam, unless the axis is
    cyclic; masked pads are regions of their own, so that every token sees at least itself.
    """
    has_seam = any((has_unknown((s,)) or s) and not wraps for s, wraps in zip(cut.shift, cyclic, strict=True))
    if not has_seam and not (mask_pads and cut.may_have_pads):
        return None
    axes = len(cut.size)
    region = torch.zeros((), dtype=torch.long, device=device)
    for size, padded, shift, wraps in zip(cut.size, cut.padded, cut.shift, cyclic, strict=True):
        place = torch.arange(padded, device=device)
        beyond_seam = (place >= padded - shift) & (not wraps)
        pad = (_wrapped(place + shift, padded) >= size) & mask_pads
        region = region[..., None] * 4 + beyond_seam + 2 * pad
    region = region.view(*chain(*zip(cut.grid, cut.window, strict=True)))
    region = _settled(region.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)))
    region = region.reshape(cut.num_windows, cut.num_tokens)
    return region[:, :, None] != region[:, None, :]


def offset_index(window: Size, window_size: Size, device: torch.device) -> Tensor:
    """Give the table row of each pair (query, key) of a ``window``: (N*N,), a row being one offset in ``window_size``.

    A window smaller than ``window_size`` has smaller offsets, which lie around the table's centre.
    """
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    for side, full in zip(window, window_size, strict=True):
        place = torch.arange(side, device=device)
        offset = place[:, None] - place[None, :] + full - 1
        index = (index[:, None, :, None] * (2 * full - 1) + offset[:, None, :]).flatten(2).flatten(0, 1)
    return index.flatten()


def corner_index(window: Size, window_size: Size, device: torch.device) -> Tensor:
    """Number the tokens of a ``window`` as they stand in the leading corner of ``window_size``: (N,)."""
    index = torch.arange(math.prod(window_size), device=device).view(window_size)
    return index[tuple(map(slice, window))].flatten()


def _pad(x: Tensor, cut: Cut, fill: Tensor | None) -> Tensor:
    if fill is None:
        missing = [p - s for p, s in zip(cut.padded, cut.size, strict=True)]
        return F.pad(x, (0, 0, *chain(*((0, m) for m in reversed(missing)))))
    return torch.where(is_pad(cut, x.device), fill.to(x.dtype), _pad(x, cut, None))


def _settled(x: Tensor) -> Tensor:
    """Copy x where sizes that are not known decide whether what follows copies it."""
    return x.clone(memory_format=torch.contiguous_format) if has_unknown(x.shape) else x


def _roll(x: Tensor, cut: Cut, sign: int) -> Tensor:
    """Roll the axes of a padded map (B, *padded, C) by the shift: forwards, or with -1 backwards."""
    shift = [sign * s for s in cut.shift]
    if not has_unknown(cut.shift):
        return x.roll(shift, dims=tuple(range(1, len(shift) + 1)))
    for axis, (by, side) in enumerate(zip(shift, cut.padded, strict=True), 1):
        x = x.index_select(axis, _wrapped(torch.arange(side, device=x.device) - by, side))
    return x


def _wrapped(place: Tensor, side: int) -> Tensor:
    """Bring places that lie less than a side off an axis back onto it; ONNX has no % by a size that is not known."""
    return torch.where(place < 0, place + side, torch.where(place >= side, place - side, place))
