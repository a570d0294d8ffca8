"""Where the windows of a map lie, and where their tokens lie in memory: the geometry that all window kernels share.

A map of H x W tokens, padded to whole windows and rolled by ``shift`` towards its start, is a grid of windows of
WH x WW. An *inner* window holds neither a pad nor a seam of the roll: its tokens lie at fixed distances from its
first one. The others are *edge* windows, to the right of the inner ones and below them. Each kind is numbered row by
row, image by image; a program walks through a run of numbers and carries the window's position as counters, for a
division of integers costs as much as dozens of other instructions.

The kernels for windows in 3-D, whose tokens come in parts, read the same from a list that ``list_windows`` writes once
a call: one number a token of the padded map, whatever the batch and the channels are.

Letters: B batch · T frames · H W map height and width · M windows of one map · N tokens in one window · wt wy wx
position of a window in the grid.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.rel_pos_bias import MASKED

GEOMETRY = ["B", "H", "W", "num_heads", "shift_h", "shift_w"]
"""Arguments whose divisibility tells the compiler nothing: a new map must not compile again."""

_MASKED = tl.constexpr(MASKED)


@triton.jit
def load_tokens(ptr, offset, real, valid, fill_ptr, d, FILL: tl.constexpr, WHOLE: tl.constexpr):
    """Load tokens (N, d): from memory where real; else, where the window goes on, (d,) at ``fill_ptr`` if FILL.

    WHOLE says that all of them are real.
    """
    if WHOLE:
        return tl.load(ptr + offset)
    else:
        x = tl.load(ptr + offset, mask=real[:, None], other=0.0)
        if FILL:
            x = tl.where((valid & ~real)[:, None], tl.load(fill_ptr + d)[None, :].to(x.dtype), x)
        return x


@triton.jit
def store_tokens(ptr, offset, x, real, WHOLE: tl.constexpr):
    """Store tokens (N, d) where they are real, in the dtype of the memory."""
    x = x.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(ptr + offset, x)
    else:
        tl.store(ptr + offset, x, mask=real[:, None])


@triton.jit
def span_of_run(count, run, num_runs):
    """Cut ``count`` windows into ``num_runs`` spans of equal length, give or take one; return this run's two ends."""
    start = count.to(tl.int64) * run // num_runs
    stop = count.to(tl.int64) * (run + 1) // num_runs
    return start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def grid_of(geometry, WH: tl.constexpr, WW: tl.constexpr):
    """Windows down and across the map, and how many of these are inner ones."""
    B, H, W, C, shift_h, shift_w = geometry
    return tl.cdiv(H, WH), tl.cdiv(W, WW), (H - shift_h) // WH, (W - shift_w) // WW


@triton.jit
def count_windows(grid, EDGE: tl.constexpr):
    """Count the edge windows, or the inner ones, of one image."""
    grid_h, grid_w, inner_h, inner_w = grid
    inner = inner_h * inner_w
    return grid_h * grid_w - inner if EDGE else inner


@triton.jit
def locate_window(index, grid, EDGE: tl.constexpr):
    """Position (b, wy, wx) of the edge or inner window of this number."""
    grid_h, grid_w, inner_h, inner_w = grid
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
def next_window(b, wy, wx, grid, EDGE: tl.constexpr):
    """Position of the edge or inner window after (b, wy, wx)."""
    grid_h, grid_w, inner_h, inner_w = grid
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
def first_token(b, wy, wx, geometry, WH: tl.constexpr, WW: tl.constexpr):
    """Number, among all tokens, of a window's first one; 64 bits, for it will be multiplied by a stride."""
    B, H, W, C, shift_h, shift_w = geometry
    return (b * H + wy * WH + shift_h).to(tl.int64) * W + wx * WW + shift_w


@triton.jit
def place_tokens(
    i,
    wy,
    wx,
    geometry,
    WH: tl.constexpr,
    WW: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    MASK_PADS: tl.constexpr,
    RAGGED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """How far token ``i`` of a window lies behind the first one, in tokens; whether it is on the map; its region.

    Tokens see each other if they are of one region; a region ends at a seam of the roll, unless the axis is cyclic,
    and masked pads are a region apart. An inner window is one region, and its tokens lie alike wherever it is. RAGGED
    says that the windows do not divide the map, so that an edge window may hold pads.
    """
    B, H, W, C, shift_h, shift_w = geometry
    iy, ix = i // WW, i % WW
    place, real, region = iy * W + ix, i < WH * WW, tl.zeros_like(i)
    if EDGE:
        padded_h, padded_w = tl.cdiv(H, WH) * WH, tl.cdiv(W, WW) * WW
        past_h, past_w = iy >= padded_h - shift_h - wy * WH, ix >= padded_w - shift_w - wx * WW
        # In 64 bits: a map may be so large that a distance of its height, in elements, needs them.
        place = place.to(tl.int64) - tl.where(past_h, padded_h * W, 0) - tl.where(past_w, padded_w, 0)
        if not CYCLIC_H:
            region += tl.where(past_h, 1, 0)
        if not CYCLIC_W:
            region += tl.where(past_w, 2, 0)
        if RAGGED:
            real &= (past_h | (iy < H - shift_h - wy * WH)) & (past_w | (ix < W - shift_w - wx * WW))
            if MASK_PADS:
                region = tl.where(real, region, 4)
    return place, real, region


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


PAD, BEYOND = tl.constexpr(-1), tl.constexpr(-2)
"""Places of a token that only completes the map, and of a number that only completes a block of them."""


@triton.jit
def _along(i, w, size, shift, WINDOW: tl.constexpr, CYCLIC: tl.constexpr):
    """Coordinate on the map of tokens ``i`` of window ``w`` on one axis, whether it is real, and 1 past a seam."""
    padded = tl.cdiv(size, WINDOW) * WINDOW
    rolled = w * WINDOW + i
    past = rolled >= padded - shift
    x = rolled + shift - tl.where(past, padded, 0)
    seam = tl.zeros_like(i) if CYCLIC else tl.where(past, 1, 0)
    return x, x < size, seam


@triton.jit(do_not_specialize=["T", "H", "W", "shift_t", "shift_h", "shift_w"])
def _list_windows_kernel(
    place_ptr,  # (M, N) int32
    region_ptr,  # (M, N) int8
    edge_ptr,  # (M,) int32
    T,
    H,
    W,
    shift_t,
    shift_h,
    shift_w,
    WT: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    CYCLIC_T: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    MASK_PADS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least N
):
    N: tl.constexpr = WT * WH * WW
    window, i = tl.program_id(0), tl.arange(0, BLOCK)
    grid_h, grid_w = tl.cdiv(H, WH), tl.cdiv(W, WW)
    row = window // grid_w
    t, real_t, past_t = _along(i // (WH * WW), row // grid_h, T, shift_t, WT, CYCLIC_T)
    y, real_h, past_h = _along(i // WW % WH, row % grid_h, H, shift_h, WH, CYCLIC_H)
    x, real_w, past_w = _along(i % WW, window % grid_w, W, shift_w, WW, CYCLIC_W)
    real = real_t & real_h & real_w
    region = past_t + 2 * past_h + 4 * past_w
    if MASK_PADS:
        region = tl.where(real, region, 8)
    valid = i < N
    # A window without its first region whole: its greatest region differs from its least, or it holds a pad.
    greatest = tl.max(tl.where(valid, region, 0), 0)
    least = tl.min(tl.where(valid, region, 8), 0)
    pads = tl.max(tl.where(valid & ~real, 1, 0), 0)
    tl.store(place_ptr + window * N + i, tl.where(real, (t * H + y) * W + x, PAD), mask=valid)
    tl.store(region_ptr + window * N + i, region.to(tl.int8), mask=valid)
    tl.store(edge_ptr + window, tl.where((greatest != least) | (pads > 0), 1, 0))


def list_windows(
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    cyclic: Sequence[bool],
    mask_pads: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each window of a map of three axes, its tokens' places (M, N), their regions, and if it is an edge.

    A place is the token's number on the map, or PAD. Tokens see each other if they are of one region.
    """
    count, tokens = math.prod(map(triton.cdiv, size, window)), math.prod(window)
    place = torch.empty(count, tokens, dtype=torch.int32, device=device)
    region = torch.empty(count, tokens, dtype=torch.int8, device=device)
    edge = torch.empty(count, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(tokens)
    _list_windows_kernel[(count,)](place, region, edge, *size, *shift, *window, *cyclic, mask_pads, block)
    return place, region, edge
