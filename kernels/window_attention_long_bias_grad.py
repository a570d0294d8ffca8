"""The gradient of the bias in the backward of ``window_attention_long``.

A program owns a tile of it, in registers, for a run of windows. Bytes of a window and head, at 2 bytes an element:
8 N d.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import triton
import triton.language as tl

from florence_fast.kernels.window_attention_long_tiles import (
    directions,
    inverse_norms,
    load_at,
    load_places,
    load_statistic,
    scale_of,
    scores_of_tile,
)
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile
from florence_fast.kernels.window_index import span_of_run


@triton.jit
def _bias_gradient_of_window(
    ptrs, total, bias, row, key, C, d, factor, scale, N: tl.constexpr, ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr, FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add to ``total`` the gradient of a tile of the scores of one window, of rows ``row`` and keys ``key``."""
    qkv_ptr, fill_ptr, place_ptr, region_ptr, dout_ptr, lse_ptr, delta_ptr = ptrs
    place = load_places(place_ptr, row, N, ALL_ROWS)
    q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, ALL_ROWS and not PADS)
    dout = load_at(dout_ptr, place, C, fill_ptr, d, False, ALL_ROWS and not PADS)
    lse = load_statistic(lse_ptr, row, N, float("inf"), ALL_ROWS)
    delta = load_statistic(delta_ptr, row, N, 0.0, ALL_ROWS)
    place = load_places(place_ptr, key, N, ALL_KEYS)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, ALL_KEYS and not PADS)
    v = load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, ALL_KEYS and not PADS)
    k, k_rest = directions(k, COSINE)
    factor_q = inverse_norms(q) * factor if COSINE else lse
    scores = scores_of_tile(q, k, k_rest, factor_q, 1.0, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[:, None])
    return total + p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def _bias_gradient_tile(
    ptrs, at, first_row, first, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_KEYS: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, HAS_EDGES: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of ROWS x WIDTH of the bias over the windows of a run, and store it."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, edge_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr = ptrs
    start, stop, head, tokens, num_windows, C, num_heads, factor = at
    row, key, d = first_row + tl.arange(0, ROWS), first + tl.arange(0, WIDTH), tl.arange(0, D)
    bias = bias_tile(bias_ptr, first_row, ROWS, first, WIDTH, COLUMNS, FRAGMENTS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    # Carried as counters: a division costs as much as dozens of other instructions.
    b, m = start // num_windows, start % num_windows
    statistic = (start.to(tl.int64) * num_heads + head) * N
    for _ in range(start, stop):
        first_token = b.to(tl.int64) * tokens
        here = (qkv_ptr + first_token * (3 * C), fill_ptr, place_ptr + m * N, region_ptr + m * N,
                dout_ptr + first_token * C, lse_ptr + statistic, delta_ptr + statistic)  # fmt: skip
        # fmt: off
        if HAS_EDGES and tl.load(edge_ptr + m) != 0:
            total = _bias_gradient_of_window(here, total, bias, row, key, C, d, factor, scale, N, ALL_ROWS, ALL_KEYS,
                                             FILL, PADS, COSINE, PRECISION, True)
        else:
            total = _bias_gradient_of_window(here, total, bias, row, key, C, d, factor, scale, N, ALL_ROWS, ALL_KEYS,
                                             False, False, COSINE, PRECISION, False)
        # fmt: on
        m += 1
        b = tl.where(m == num_windows, b + 1, b)
        m = tl.where(m == num_windows, 0, m)
        statistic += num_heads * N
    tl.store(partial_ptr + row[:, None] * COLUMNS + key[None, :], total)


@triton.jit
def _bias_gradient_row(
    ptrs, at, first_row, chunk, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, TAIL: tl.constexpr, ALL_ROWS: tl.constexpr, FRAGMENTS: tl.constexpr, FILL: tl.constexpr,
    PADS: tl.constexpr, HAS_EDGES: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do the tile of ROWS rows and this chunk's columns, or those of the tail."""
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    # fmt: off
    if TAIL > 0 and chunk == CHUNKS:
        _bias_gradient_tile(ptrs, at, first_row, CHUNKS * WIDTH, scale, N, D, ROWS, TAIL, ALL_ROWS, COLUMNS == N,
                            COLUMNS, FRAGMENTS, FILL, PADS, HAS_EDGES, COSINE, PRECISION)
    elif CHUNKS > 0:
        _bias_gradient_tile(ptrs, at, first_row, chunk * WIDTH, scale, N, D, ROWS, WIDTH, ALL_ROWS,
                            WIDTH * CHUNKS <= N, COLUMNS, FRAGMENTS, FILL, PADS, HAS_EDGES, COSINE, PRECISION)
    # fmt: on


@triton.jit(do_not_specialize=["tokens", "num_windows", "num_heads", "num_runs", "count"])
def _window_attention_long_bias_grad_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS + LAST, COLUMNS), divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    dout_ptr,  # (B, T, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32
    dbias_partial_ptr,  # (runs, h, ROWS*BLOCKS + LAST, COLUMNS) float32
    tokens,  # T*H*W
    num_windows,  # M
    num_heads,
    num_runs,
    count,  # B*M
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr,
    PADS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    SIZE: tl.constexpr = (ROWS * BLOCKS + LAST) * COLUMNS
    DOWN: tl.constexpr = BLOCKS + 1 if LAST > 0 else BLOCKS
    ACROSS: tl.constexpr = CHUNKS + 1 if TAIL > 0 else CHUNKS
    tile, rest = tl.program_id(0) % (DOWN * ACROSS), tl.program_id(0) // (DOWN * ACROSS)
    head, run = rest % num_heads, rest // num_heads
    block, chunk = tile // ACROSS, tile % ACROSS
    start, stop = span_of_run(count, run, num_runs)
    C = num_heads * D
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    at = (start, stop, head, tokens, num_windows, C, num_heads, scale_of(logit_scale_ptr, head, scale, COSINE))
    dbias_partial_ptr += (run * num_heads + head).to(tl.int64) * SIZE
    ptrs = (qkv_ptr + head * D, bias_ptr + head * SIZE, fill_ptr + head * D, place_ptr, region_ptr, edge_ptr,
            dout_ptr + head * D, lse_ptr, delta_ptr, dbias_partial_ptr)  # fmt: skip
    # fmt: off
    if LAST > 0 and block == BLOCKS:
        _bias_gradient_row(ptrs, at, BLOCKS * ROWS, chunk, log2_scale, N, D, LAST, WIDTH, CHUNKS, TAIL,
                           ROWS * BLOCKS + LAST == N, False, FILL, PADS, HAS_EDGES, COSINE, PRECISION)
    else:
        _bias_gradient_row(ptrs, at, block * ROWS, chunk, log2_scale, N, D, ROWS, WIDTH, CHUNKS, TAIL,
                           ROWS * BLOCKS <= N, FRAGMENTS, FILL, PADS, HAS_EDGES, COSINE, PRECISION)
    # fmt: on
