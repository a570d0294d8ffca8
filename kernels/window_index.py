"""Where the windows of a map lie, and where their tokens lie in memory: the geometry that all window kernels share.

A map of H x W tokens, padded to whole windows and rolled by ``shift`` towards its start, is a grid of windows of
WH x WW. An *inner* window holds neither a pad nor a seam of the roll: its tokens lie at fixed distances from its
first one. The others are *edge* windows, to the right of the inner ones and below them. Each kind is numbered row by
row, image by image; a program walks through a run of numbers and carries the window's position as counters, for a
division of integers costs as much as dozens of other instructions.

Letters: B batch · H W map height and width · N tokens in one window · wy wx position of a window in the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import MASKED
from florence_fast.kernels.targets import Target

GEOMETRY = ["B", "H", "W", "num_heads", "shift_h", "shift_w"]
"""Arguments whose divisibility tells the compiler nothing: a new map must not compile again."""

_MASKED = tl.constexpr(MASKED)


@dataclass(frozen=True)
class WindowPlan:
    """The sizes of one call: ``full`` is the window that was asked for, ``window`` no longer than the map."""

    batch: int
    size: tuple[int, int]
    num_heads: int
    head_dim: int
    full: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @staticmethod
    def of(qkv: Tensor, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int]) -> "WindowPlan":
        """Derive the sizes from qkv (B, H, W, 3*C): an axis no longer than the window is one window, not shifted."""
        batch, *size, channels = qkv.shape
        window = tuple(min(s, w) for s, w in zip(size, window_size, strict=True))
        shift = tuple(0 if s <= w else x for s, w, x in zip(size, window_size, shift_size, strict=True))
        return WindowPlan(batch, tuple(size), num_heads, channels // (3 * num_heads), tuple(window_size), window, shift)

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def windows(self) -> int:
        """How many windows a whole batch has."""
        return self.batch * triton.cdiv(self.size[0], self.window[0]) * triton.cdiv(self.size[1], self.window[1])

    @property
    def has_edges(self) -> bool:
        """Whether some window holds a pad or a seam of the roll."""
        return any(self.shift) or any(s % w for s, w in zip(self.size, self.window, strict=True))

    def runs(self, config: Config, target: Target) -> int:
        """Into how many runs the windows are cut, so that all programs are on the GPU at once."""
        return max(1, min(self.windows, config.programs_per_sm * target.num_sms // self.num_heads))


@triton.jit
def load_tokens(ptr, offset, real, valid, fill_ptr, d, FILL: tl.constexpr):
    """Load tokens (N, d): from memory where real; else, where the window goes on, (d,) at ``fill_ptr`` if FILL."""
    x = tl.load(ptr + offset, mask=real[:, None], other=0.0)
    if FILL:
        x = tl.where((valid & ~real)[:, None], tl.load(fill_ptr + d)[None, :].to(x.dtype), x)
    return x


@triton.jit
def span_of_run(count, run, num_runs):
    """Cut ``count`` windows into ``num_runs`` spans of equal length, give or take one; return this run's two ends."""
    start = count.to(tl.int64) * run // num_runs
    stop = count.to(tl.int64) * (run + 1) // num_runs
    return start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def grids(H, W, shift_h, shift_w, WH: tl.constexpr, WW: tl.constexpr):
    """Windows down and across the map, and how many of these are inner ones."""
    return tl.cdiv(H, WH), tl.cdiv(W, WW), (H - shift_h) // WH, (W - shift_w) // WW


@triton.jit
def count_windows(grid_h, grid_w, inner_h, inner_w, EDGE: tl.constexpr):
    """Count the edge windows, or the inner ones, of one image."""
    inner = inner_h * inner_w
    return grid_h * grid_w - inner if EDGE else inner


@triton.jit
def locate_window(index, grid_h, grid_w, inner_h, inner_w, EDGE: tl.constexpr):
    """Position (b, wy, wx) of the edge or inner window of this number."""
    # There may be none of the kind: the loop over them is empty then, and zero must not divide before it.
    if EDGE:
        per_row = tl.maximum(grid_w - inner_w, 1)
        above = inner_h * (grid_w - inner_w)
        per_image = tl.maximum(above + (grid_h - inner_h) * grid_w, 1)
        rest = index % per_image
        below = rest - above
        wy = tl.where(below >= 0, inner_h + below // grid_w, rest // per_row)
        wx = tl.where(below >= 0, below % grid_w, inner_w + rest % per_row)
        return index // per_image, wy, wx
    else:
        per_row, per_column = tl.maximum(inner_w, 1), tl.maximum(inner_h, 1)
        row = index // per_row
        return row // per_column, row % per_column, index % per_row


@triton.jit
def next_window(b, wy, wx, grid_h, grid_w, inner_h, inner_w, EDGE: tl.constexpr):
    """Position of the edge or inner window after (b, wy, wx)."""
    wx += 1
    if EDGE:
        row_ends = wx == grid_w
        wy = tl.where(row_ends, wy + 1, wy)
        image_ends = wy == grid_h
        wy = tl.where(image_ends, tl.where(grid_w > inner_w, 0, inner_h), wy)
        wx = tl.where(row_ends, tl.where(wy < inner_h, inner_w, 0), wx)
    else:
        row_ends = wx == inner_w
        wx = tl.where(row_ends, 0, wx)
        wy = tl.where(row_ends, wy + 1, wy)
        image_ends = wy == inner_h
        wy = tl.where(image_ends, 0, wy)
    return tl.where(image_ends, b + 1, b), wy, wx


@triton.jit
def inner_start(b, wy, wx, H, W, shift_h, shift_w, WH: tl.constexpr, WW: tl.constexpr):
    """Number of the first token of an inner window among all tokens; 64 bits, as it will be multiplied by a stride."""
    return ((b * H + wy * WH + shift_h) * W + wx * WW + shift_w).to(tl.int64)


@triton.jit
def inner_place(i, W, WW: tl.constexpr):
    """How far token ``i`` of an inner window lies behind the first one, in tokens."""
    return i // WW * W + i % WW


@triton.jit
def edge_place(
    i,
    wy,
    wx,
    H,
    W,
    shift_h,
    shift_w,
    WH: tl.constexpr,
    WW: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    MASK_PADS: tl.constexpr,
):
    """Where token ``i`` of an edge window lies behind its image's first token, whether it is on the map, its region.

    Tokens see each other if they are of one region; a region ends at a seam of the roll, unless the axis is cyclic,
    and masked pads are a region apart.
    """
    padded_h, padded_w = tl.cdiv(H, WH) * WH, tl.cdiv(W, WW) * WW
    y, x = wy * WH + i // WW + shift_h, wx * WW + i % WW + shift_w
    past_h, past_w = y >= padded_h, x >= padded_w
    y, x = tl.where(past_h, y - padded_h, y), tl.where(past_w, x - padded_w, x)
    real = (y < H) & (x < W) & (i < WH * WW)
    region = tl.zeros_like(i)
    if not CYCLIC_H:
        region += tl.where(past_h, 1, 0)
    if not CYCLIC_W:
        region += tl.where(past_w, 2, 0)
    if MASK_PADS:
        region = tl.where(real, region, 4)
    return (y * W + x).to(tl.int64), real, region


@triton.jit
def hide_other_regions(rows, columns, scores, PRECISION: tl.constexpr):
    """Add to ``scores`` (N, N) what hides the keys that are of another region than the query.

    It is a product of one-hot rows, exact in any precision because each sum has one term that is not zero: tensor
    cores do it while a comparison of every pair would cost more instructions, and registers, than the softmax.
    """
    slot = tl.arange(0, 16)
    seen = tl.where(rows[:, None] == slot[None, :], 1.0, 0.0)
    hidden = tl.where(columns[:, None] == slot[None, :], 0.0, _MASKED)
    return tl.dot(seen, tl.trans(hidden), scores, input_precision=PRECISION)
