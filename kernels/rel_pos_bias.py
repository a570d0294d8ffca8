"""The relative position bias between its table and the N x N form that the window kernels add, both ways.

``expand_bias`` writes the form that a kernel reads: divided by the scale, because it is what q k^T starts from, and
with pad keys masked. ``fold_bias_grad`` sums the partial gradients that the programs of a backward left, in an order
that depends on nothing but their number, and folds them into the table: no atomics, the same bits in every run.
Both are small: (2WT-1)(2WH-1)(2WW-1) h numbers on one side, N^2 h, or that times the number of runs, on the other.

Letters: N tokens in one window · h heads · FT FH FW the window that the table is made for, never smaller than the
window WT x WH x WW itself. A table holds one row per offset (dt, dy, dx) of a query from a key. A window in 2-D is one
of a single frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MASKED = -1e30
"""What hides a key. Finite, so that a row without a visible key gives numbers, which are then multiplied by zeros."""
MASKED_FP16 = -6e4
"""The same where it has to fit into float16."""


@dataclass(frozen=True)
class BiasForm:
    """What a kernel wants: ``rows`` x ``columns``, N x N of them in use, row by row or in order of fragments.

    In order of fragments, blocks of 64 rows hold the columns 0 to 127 and then the rest so that the elements which
    one thread of four warps owns in a tensor-core accumulator lie side by side; rows beyond whole blocks lie row by
    row (see ``fragment_place``). ``transposed`` lets the keys be the rows.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    fragments: bool = False
    transposed: bool = False


def three_axes(values: Sequence[Any], first: Any) -> tuple[Any, Any, Any]:
    """Put ``first`` before values for two axes."""
    return (*(() if len(values) == 3 else (first,)), *values)


@triton.jit
def fragment_place(f):
    """Row and column, in a tile of 64 x 16*n, of the number ``f`` of its elements stored in order of fragments.

    The order is [column / 16, warp, row % 8, column % 8 / 2, column % 16 / 8, row % 16 / 8, column % 2]: an
    accumulator of tensor cores gives a thread two neighbours in four corners of a square of 16 x 16.
    """
    row = (f >> 8 & 3) * 16 + (f >> 1 & 1) * 8 + (f >> 5 & 7)
    column = (f >> 10) * 16 + (f >> 2 & 1) * 8 + (f >> 3 & 3) * 2 + (f & 1)
    return row, column


@triton.jit
def _place(f, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr):
    """Row and column of element ``f`` of one head's bias."""
    row, column = f // COLUMNS, f % COLUMNS
    if FRAGMENTS:
        block, rest = f // (64 * COLUMNS), f % (64 * COLUMNS)
        in_wide = rest < 64 * 128
        tile_row, tile_column = fragment_place(tl.where(in_wide, rest, rest - 64 * 128))
        in_block = f < ROWS // 64 * 64 * COLUMNS
        row = tl.where(in_block, block * 64 + tile_row, row)
        column = tl.where(in_block, tl.where(in_wide, tile_column, 128 + tile_column), column)
    return row, column


@triton.jit
def _expand_bias_kernel(
    source_ptr,  # the table ((2FT-1)(2FH-1)(2FW-1), h), or the whole bias (h, FT*FH*FW, FT*FH*FW), or nothing
    expanded_ptr,  # (h, ROWS*COLUMNS)
    num_heads,
    scale,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    WT: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    SOURCE: tl.constexpr,  # "table", "bias" or "none"
    BLOCK: tl.constexpr,
):
    head, f = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = _place(f, ROWS, COLUMNS, FRAGMENTS)
    i, j = (column, row) if TRANSPOSED else (row, column)
    N: tl.constexpr = WT * WH * WW
    used = (i < N) & (j < N)
    it, iy, ix = i // (WH * WW), i // WW % WH, i % WW
    jt, jy, jx = j // (WH * WW), j // WW % WH, j % WW
    value = tl.zeros((BLOCK,), tl.float32)
    if SOURCE == "table":
        offset = ((it - jt + FT - 1) * (2 * FH - 1) + iy - jy + FH - 1) * (2 * FW - 1) + ix - jx + FW - 1
        value = tl.load(source_ptr + offset * num_heads + head, mask=used, other=0.0).to(tl.float32)
    if SOURCE == "bias":
        F: tl.constexpr = FT * FH * FW
        pair = ((it * FH + iy) * FW + ix) * F + (jt * FH + jy) * FW + jx
        value = tl.load(source_ptr + head.to(tl.int64) * (F * F) + pair, mask=used, other=0.0).to(tl.float32)
    value = value / scale
    # Whoever masks with -inf gets what hides here: a part of a row may hold nothing else.
    value = tl.where((j >= N) | (value < MASKED), MASKED, value)
    expanded_ptr += head * (ROWS * COLUMNS) + f
    tl.store(expanded_ptr, value.to(expanded_ptr.dtype.element_ty), mask=f < ROWS * COLUMNS)


def expand_bias(
    table: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    full: Sequence[int],
    window: Sequence[int],
    form: BiasForm,
    device: torch.device,
) -> Tensor:
    """Return the bias (h, rows*columns) in the form that a kernel reads, zeros if neither source is given."""
    source = bias if table is None else table
    expanded = torch.empty(num_heads, form.rows * form.columns, dtype=form.dtype, device=device)
    block = 1024 if form.rows * form.columns <= 1 << 16 else 4096
    _expand_bias_kernel[(num_heads, triton.cdiv(form.rows * form.columns, block))](
        expanded if source is None else source.contiguous(),
        expanded,
        num_heads,
        scale,
        *three_axes(full, 1),
        *three_axes(window, 1),
        form.rows,
        form.columns,
        form.fragments,
        form.transposed,
        MASKED_FP16 if form.dtype == torch.float16 else MASKED,
        "none" if source is None else "bias" if table is None else "table",
        block,
    )
    return expanded


@triton.jit
def _fold_bias_grad_kernel(
    partial_ptr,  # (runs, h, ROWS, COLUMNS) float32
    dtable_ptr,  # ((2FT-1)(2FH-1)(2FW-1), h)
    num_runs,
    num_heads,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    WT: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,  # a power of two, at least WW
    OFFSETS: tl.constexpr,  # a power of two: how many dx are compared at a time
    RUNS: tl.constexpr,  # partials added at a time
):
    """Sum, for one head, one dt and one dy, the pairs of tokens that are (dt, dy, dx) apart, for every dx."""
    head, plane = tl.program_id(0), tl.program_id(1)
    dt, dy = plane // (2 * FH - 1) - (FT - 1), plane % (2 * FH - 1) - (FH - 1)
    run, ix, jx = tl.arange(0, RUNS), tl.arange(0, SIDE), tl.arange(0, SIDE)
    pair = ix[:, None] * COLUMNS + jx[None, :]
    in_window = (ix < WW)[:, None] & (jx < WW)[None, :]
    total = tl.zeros((RUNS, SIDE, SIDE), tl.float32)
    for first_run in range(0, num_runs, RUNS):
        here = (first_run + run)[:, None, None]
        partial = partial_ptr + (here.to(tl.int64) * num_heads + head) * (ROWS * COLUMNS) + pair[None, :, :]
        read = (here < num_runs) & in_window[None, :, :]
        for it in range(tl.maximum(dt, 0), tl.minimum(WT, WT + dt)):
            for iy in range(tl.maximum(dy, 0), tl.minimum(WH, WH + dy)):
                i, j = (it * WH + iy) * WW, ((it - dt) * WH + iy - dy) * WW
                total += tl.load(partial + (i * COLUMNS + j), mask=read, other=0.0)
    by_pair = tl.sum(total, 0)
    for first in range(1 - FW, FW, OFFSETS):
        dx = first + tl.arange(0, OFFSETS)
        apart = (ix[:, None] - jx[None, :])[None, :, :] == dx[:, None, None]
        folded = tl.sum(tl.sum(tl.where(apart, by_pair[None, :, :], 0.0), 2), 1)
        row = plane * (2 * FW - 1) + dx + FW - 1
        tl.store(dtable_ptr + row * num_heads + head, folded.to(dtable_ptr.dtype.element_ty), mask=dx < FW)


def fold_bias_grad(partial: Tensor, table: Tensor, full: Sequence[int], window: Sequence[int]) -> Tensor:
    """Return the gradient of ``table`` from the partial gradients (runs, h, rows, columns) of the N x N bias."""
    num_runs, num_heads, rows, columns = partial.shape
    dtable = torch.empty_like(table, memory_format=torch.contiguous_format)
    full, window = three_axes(full, 1), three_axes(window, 1)
    side, offsets = triton.next_power_of_2(window[2]), triton.next_power_of_2(2 * full[2] - 1)
    _fold_bias_grad_kernel[(num_heads, (2 * full[0] - 1) * (2 * full[1] - 1))](
        partial,
        dtable,
        num_runs,
        num_heads,
        *full,
        *window,
        rows,
        columns,
        side,
        min(offsets, max(1, 8192 // (side * side))),
        max(1, 4096 // (side * side)),
    )
    return dtable


def place_bias_grad(partial: Tensor, bias: Tensor, full: Sequence[int], window: Sequence[int]) -> Tensor:
    """Return the gradient of the whole ``bias`` (h, F, F), F = FT*FH*FW: that of its leading corner, else zeros."""
    num_heads, tokens = partial.shape[1], math.prod(window)
    used = partial.sum(0)[:, :tokens, :tokens].to(bias.dtype)
    if tuple(full) == tuple(window):
        return used.contiguous()
    dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    corner = tuple(map(slice, window))
    corner = dbias.view(num_heads, *full, *full)[(slice(None), *corner, *corner)]
    corner.copy_(used.reshape(num_heads, *window, *window))
    return dbias
