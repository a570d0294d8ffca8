"""Window attention for 64 < N <= 144 tokens a window (12 x 12): the rows of a window in blocks, its keys all at hand.

What ``window_attention`` says holds here too, except that neither the bias nor its gradient fits into registers. The
bias is read per window, in 16 bits for a qkv of 16 bits and in the order in which a thread holds the scores, so that
it goes from the cache to registers in loads of 16 bytes. Keys and values stay for the whole window, as 128 tokens and
16; rows come as a loop of blocks of 64 and a tail of 16, for an unrolled body spills. The forward of a training step
keeps the log-sum-exp of each row, in base 2; the backward leaves delta, the sum of p dp of a row, to a third kernel
that sums nothing but the gradient of the bias, in registers, over a run of windows.

Bytes of a window and head, at 2 bytes an element: forward 8 N d; backward 14 N d, and 8 N d for the bias gradient.

Letters: B batch · H W map height and width · C channels · M windows of one map · N tokens in one window · h heads ·
d head dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import BiasForm
from florence_fast.kernels.window_call import WindowCall
from florence_fast.kernels.window_index import (
    GEOMETRY,
    count_windows,
    first_token,
    grid_of,
    hide_other_regions,
    load_tokens,
    locate_window,
    next_window,
    place_tokens,
    span_of_run,
    store_tokens,
)

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def fast_log2(x, APPROXIMATE: tl.constexpr):
    """Base-2 logarithm: one instruction, right to 2^-22, or the compiler's own, which takes twenty."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def bias_tile(
    ptr,
    first_row,
    ROWS: tl.constexpr,
    FIRST,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Read (ROWS, WIDTH) of one head's bias from column FIRST on, which lies in one of the orders of ``BiasForm``."""
    if FRAGMENTS:
        x = tl.load(ptr + first_row * COLUMNS + FIRST * ROWS + tl.arange(0, ROWS * WIDTH))
        x = tl.reshape(x, (WIDTH // 16, 4, 8, 4, 2, 2, 2))
        return tl.reshape(tl.permute(x, (1, 5, 2, 0, 4, 3, 6)), (ROWS, WIDTH)).to(tl.float32)
    else:
        row, column = first_row + tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
        return tl.load(ptr + row[:, None] * COLUMNS + column[None, :]).to(tl.float32)


@triton.jit
def tile_scores(q, k, bias, row_region, key_region, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """Give q k^T + bias, hidden keys far below the others."""
    if EDGE:
        bias = hide_other_regions(row_region, key_region, bias, PRECISION if q.dtype == tl.float32 else "tf32")
    return tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)


@triton.jit
def _forward_rows(
    first_row,
    ptrs,
    keys,
    regions,
    at,
    geometry,
    scale,
    ROWS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    KEEP_LSE: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Attend from ROWS rows of a window to all its keys; ``keys`` is (k, v) of the first 128 and of the others."""
    q_ptr, fill_ptr, bias_ptr, out_ptr, lse_ptr = ptrs
    B, H, W, C, shift_h, shift_w = geometry
    b, wy, wx = at
    row, d = first_row + tl.arange(0, ROWS), tl.arange(0, D)
    valid = row < WH * WW
    WHOLE: tl.constexpr = WHOLE_ROWS and not (EDGE and RAGGED)
    place, real, region = place_tokens(row, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
    q = load_tokens(q_ptr, place[:, None] * (3 * C) + d[None, :], real, valid, fill_ptr, d, FILL and EDGE, WHOLE)
    scale *= LOG2_E
    bias = bias_tile(bias_ptr, first_row, ROWS, 0, 128, COLUMNS, FRAGMENTS)
    wide = tile_scores(q, keys[0], bias, region, regions[0], EDGE, PRECISION)
    top = tl.max(wide, 1)
    if COLUMNS > 128:
        bias = bias_tile(bias_ptr, first_row, ROWS, 128, COLUMNS - 128, COLUMNS, FRAGMENTS)
        narrow = tile_scores(q, keys[2], bias, region, regions[1], EDGE, PRECISION)
        top = tl.maximum(top, tl.max(narrow, 1))
    top *= scale
    p = tl.exp2(wide * scale - top[:, None])
    total = tl.sum(p, 1)
    out = tl.dot(p.to(q.dtype), keys[1], input_precision=PRECISION)
    if COLUMNS > 128:
        p = tl.exp2(narrow * scale - top[:, None])
        total += tl.sum(p, 1)
        out = tl.dot(p.to(q.dtype), keys[3], out, input_precision=PRECISION)
    out *= (1.0 / total)[:, None]
    store_tokens(out_ptr, place[:, None] * C + d[None, :], out, real, WHOLE)
    if KEEP_LSE:
        lse = top + fast_log2(total, FAST_LOG2)
        if WHOLE:
            tl.store(lse_ptr + row, lse)
        else:
            tl.store(lse_ptr + row, lse, mask=valid)


@triton.jit
def _forward_windows(
    ptrs,
    head,
    num_heads,
    geometry,
    run,
    num_runs,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    KEEP_LSE: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Attend in this run's inner windows, or in its edge windows."""
    qkv_ptr, fill_ptr, bias_ptr, out_ptr, lse_ptr = ptrs
    B, H, W, C, shift_h, shift_w = geometry
    N: tl.constexpr = WH * WW
    WHOLE: tl.constexpr = N == COLUMNS and not (EDGE and RAGGED)
    WHOLE_ROWS: tl.constexpr = N == ROWS * BLOCKS + TAIL
    d, i, j = tl.arange(0, D), tl.arange(0, 128), 128 + tl.arange(0, 16)
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for _ in range(start, stop):
        first = first_token(b, wy, wx, geometry, WH, WW)
        window = (b * grid[0] + wy) * grid[1] + wx
        ptr = qkv_ptr + first * (3 * C)
        place, real, region_0 = place_tokens(i, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
        offset = place[:, None] * (3 * C) + d[None, :]
        k_0 = load_tokens(ptr + C, offset, real, i < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
        v_0 = load_tokens(ptr + 2 * C, offset, real, i < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
        keys, regions = (k_0, v_0), (region_0, region_0)
        if COLUMNS > 128:
            place, real, region_1 = place_tokens(
                j, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE
            )
            offset = place[:, None] * (3 * C) + d[None, :]
            k_1 = load_tokens(ptr + C, offset, real, j < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
            v_1 = load_tokens(ptr + 2 * C, offset, real, j < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
            keys, regions = (k_0, v_0, k_1, v_1), (region_0, region_1)
        row_ptrs = (
            ptr,
            fill_ptr,
            bias_ptr,
            out_ptr + first * C,
            lse_ptr + (window.to(tl.int64) * num_heads + head) * N,
        )
        # fmt: off
        for block in range(BLOCKS):
            _forward_rows(block * ROWS, row_ptrs, keys, regions, (b, wy, wx), geometry, scale, ROWS, WHOLE_ROWS,
                          FRAGMENTS, WH, WW, D, COLUMNS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, KEEP_LSE, FAST_LOG2,
                          PRECISION, EDGE)
        if TAIL > 0:
            _forward_rows(BLOCKS * ROWS, row_ptrs, keys, regions, (b, wy, wx), geometry, scale, TAIL, WHOLE_ROWS,
                          False, WH, WW, D, COLUMNS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, KEEP_LSE, FAST_LOG2,
                          PRECISION, EDGE)
        # fmt: on
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)


@triton.jit(do_not_specialize=GEOMETRY)
def _window_attention_tall_fwd_kernel(
    qkv_ptr,  # (B, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS+TAIL, COLUMNS), divided by scale
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    out_ptr,  # (B, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32; written if KEEP_LSE
    B,
    H,
    W,
    num_heads,
    shift_h,
    shift_w,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    KEEP_LSE: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    head, run, num_runs = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    bias_ptr += head * (ROWS * BLOCKS + TAIL) * COLUMNS
    ptrs = (qkv_ptr + head * D, fill_ptr + head * D, bias_ptr, out_ptr + head * D, lse_ptr)
    geometry = (B, H, W, num_heads * D, shift_h, shift_w)
    # fmt: off
    _forward_windows(ptrs, head, num_heads, geometry, run, num_runs, scale, WH, WW, D, COLUMNS, ROWS, BLOCKS, TAIL,
                     FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, KEEP_LSE, FAST_LOG2, PRECISION, False)
    if HAS_EDGES:
        _forward_windows(ptrs, head, num_heads, geometry, run, num_runs, scale, WH, WW, D, COLUMNS, ROWS, BLOCKS, TAIL,
                         FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, KEEP_LSE, FAST_LOG2, PRECISION, True)
    # fmt: on


def block_rows(call: WindowCall) -> int:
    """Return how many rows of scores are held at a time: 64, or 16 where registers hold no more."""
    if call.qkv.dtype == torch.float32:
        return 64 if call.precision == "tf32" and call.head_dim <= 32 else 16
    return 64 if call.head_dim <= 64 else 16


def key_columns(call: WindowCall) -> int:
    """Return how many keys are held: 128, or 16 more."""
    return 128 if call.tokens <= 128 else 144


def tall_forward(call: WindowCall, out: Tensor, lse: Tensor | None) -> None:
    """Attend, and leave the log-sum-exp of each row in ``lse`` if it is given."""
    rows, columns = block_rows(call), key_columns(call)
    rest = call.tokens % rows
    tail = 16 if 0 < rest <= 16 and rows == 64 else 0
    blocks = call.tokens // rows + (rest > tail)
    fragments = rows == 64 and call.qkv.dtype != torch.float32
    form = BiasForm(rows * blocks + tail, columns, call.qkv.dtype, fragments)
    default = Config(4, 2, 2) if rows == 64 else Config(8, 1, 1)
    config = call.config("window_attention_tall_fwd", call.tokens, default)
    _window_attention_tall_fwd_kernel[(call.num_heads * call.runs(config, call.num_heads),)](
        call.qkv,
        call.expand(form),
        call.fill,
        out,
        out if lse is None else lse,
        *call.sizes,
        columns,
        rows,
        blocks,
        tail,
        fragments,
        *call.rules,
        lse is not None,
        call.qkv.device.type != "cpu",
        call.precision,
        call.has_edges,
        **config.options,
    )
