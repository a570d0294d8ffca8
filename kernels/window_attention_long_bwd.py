"""The backward of ``window_attention_long``: three kernels, each computing the probabilities anew.

The first gives dq and delta, the sum of p dp of a row. It meets each key once: with any constant c of a row,
sum p (dp - delta) k = sum p (dp - c) k - (delta - c) sum p k, and c near delta, from the first chunk of keys, leaves
nothing to cancel. The second gives dk and dv: its tiles are transposed, keys by queries, from a transposed bias, so
that no product has a transposed product on its left, which some Triton versions get wrong on Hopper. The third sums
the gradient of the bias: a program owns a tile of it, in registers, for a run of windows.

Bytes of a window and head, at 2 bytes an element: 10 N d, 12 N d and, for the bias gradient, 8 N d.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.window_attention_long import (
    MAX_LOG_SCALE,
    SIZES,
    config_of_tiles,
    flags_of,
    inverse_norms,
    load_at,
    load_places,
    scale_of,
    scores_of_tile,
    splits_of,
    store_at,
    this_program,
    tiles_of,
    windows_of,
)
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile
from florence_fast.kernels.window_call import WindowCall
from florence_fast.kernels.window_index import PAD, span_of_run

SCRATCH_BYTES = 128 << 20
"""What the partial gradients of the bias may take."""


@triton.jit
def _direction(x, inverse, COSINE: tl.constexpr):
    """Give x/|x| (n, d) rounded to the dtype of x, for gradients, or x itself."""
    if COSINE:
        return (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def _through_norm(dx, x, inverse):
    """Turn the gradient of x/|x| (n, d) into that of x; give also its part along x (n,)."""
    x = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(dx * x, 1)
    return (dx - x * along[:, None]) * inverse[:, None], along


@triton.jit
def _load_statistics(lse_ptr, delta_ptr, i, N: tl.constexpr):
    """Log-sum-exp and delta of rows ``i``; those beyond the window get no probabilities."""
    valid = i < N
    lse = tl.load(lse_ptr + i, mask=valid, other=float("inf"))
    return lse, tl.load(delta_ptr + i, mask=valid, other=0.0)


@triton.jit
def _query_chunk(
    q, dout, lse, factor, row, centre, state, ptrs, first, C, d, scale, FIRST_ROW, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Let the rows meet WIDTH keys; ``state`` is the sums of p (dp - c) k, p k and p (dp - c); ``centre`` is c."""
    spread_keys, keys, spread = state
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr = ptrs
    key = first + tl.arange(0, WIDTH)
    place = load_places(place_ptr, key, N)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    v = load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)
    bias = bias_tile(bias_ptr, FIRST_ROW, q.shape[0], first, WIDTH, COLUMNS, FRAGMENTS)
    inverse = inverse_norms(k) if COSINE else factor
    scores = scores_of_tile(q, k, factor, inverse, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if FIRST:
        centre = tl.sum(p * dp, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
    k = _direction(k, inverse, COSINE)
    keys = tl.dot(p.to(k.dtype), k, keys, input_precision=PRECISION)
    p *= dp - centre[:, None]
    spread += tl.sum(p, 1)
    spread_keys = tl.dot(p.to(k.dtype), k, spread_keys, input_precision=PRECISION)
    return centre, (spread_keys, keys, spread)


@triton.jit
def _differentiate_rows(
    ptrs, outs, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of this program's part of a window's rows; give their part of dlogit_scale (ROWS,)."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr = ptrs
    dout_ptr, dqkv_ptr, lse_ptr, delta_ptr = outs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    d = tl.arange(0, D)
    dlog = tl.zeros((ROWS,), tl.float32)
    for block in range(split * BLOCKS // splits, (split + 1) * BLOCKS // splits):
        row = block * ROWS + tl.arange(0, ROWS)
        place = load_places(place_ptr, row, N)
        q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, False)
        dout = load_at(dout_ptr, place, C, fill_ptr, d, False, False)
        lse = tl.load(lse_ptr + row, mask=row < N, other=float("inf"))
        inverse = inverse_norms(q) if COSINE else lse
        factor_q = inverse * factor
        none = tl.zeros((ROWS,), tl.float32)
        state = (tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32), none)
        # fmt: off
        if CHUNKS > 0:
            centre, state = _query_chunk(q, dout, lse, factor_q, row, none, state, ptrs, 0, C, d, scale, block * ROWS,
                                         True, WIDTH, WHOLE, COLUMNS, N, FRAGMENTS, FILL, COSINE,
                                         PRECISION, EDGE)
            for chunk in range(1, CHUNKS):
                centre, state = _query_chunk(q, dout, lse, factor_q, row, centre, state, ptrs, chunk * WIDTH, C, d,
                                             scale, block * ROWS, False, WIDTH, WHOLE, COLUMNS, N,
                                             FRAGMENTS, FILL, COSINE, PRECISION, EDGE)
        else:
            centre = none
        if TAIL > 0:
            centre, state = _query_chunk(q, dout, lse, factor_q, row, centre, state, ptrs, CHUNKS * WIDTH, C, d,
                                         scale, block * ROWS, CHUNKS == 0, TAIL,
                                         not PADS and COLUMNS == N, COLUMNS, N, FRAGMENTS, FILL, COSINE,
                                         PRECISION, EDGE)
        # fmt: on
        spread_keys, keys, spread = state
        tl.store(delta_ptr + row, centre + spread, mask=row < N)
        dq = (spread_keys - spread[:, None] * keys) * factor
        if COSINE:
            dq, along = _through_norm(dq, q, inverse)
            dlog += along
        store_at(dqkv_ptr, place, 3 * C, dq, d, False)
    return dlog


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_dq_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    dout_ptr,  # (B, T, H, W, h, d)
    dqkv_ptr,  # (B, T, H, W, 3, h, d), the first third written
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32, written
    dlog_partial_ptr,  # (B*M*splits, h) float32; written if COSINE
    tokens,  # T*H*W
    num_windows,  # M
    num_heads,
    splits,  # programs that share the rows of a window
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    head, split, window, b, m = this_program(num_heads, splits, num_windows)
    C = num_heads * D
    first_token, statistic = b.to(tl.int64) * tokens, (window.to(tl.int64) * num_heads + head) * N
    qkv_ptr, dqkv_ptr = qkv_ptr + first_token * (3 * C) + head * D, dqkv_ptr + first_token * (3 * C) + head * D
    dout_ptr += first_token * C + head * D
    bias_ptr += head * (ROWS * BLOCKS * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, bias_ptr, fill_ptr + head * D, place_ptr, region_ptr)
    outs = (dout_ptr, dqkv_ptr, lse_ptr + statistic, delta_ptr + statistic)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        dlog = _differentiate_rows(ptrs, outs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS,
                                   TAIL, FRAGMENTS, FILL, PADS, COSINE, PRECISION, True)
    else:
        dlog = _differentiate_rows(ptrs, outs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS,
                                   TAIL, FRAGMENTS, False, False, COSINE, PRECISION, False)
    # fmt: on
    if COSINE:
        tl.store(dlog_partial_ptr + tl.program_id(0), tl.sum(dlog, 0))


@triton.jit
def _key_chunk(
    k, v, inverse_k, key, state, ptrs, first, C, d, factor, scale, FIRST_KEY, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, FRAGMENTS: tl.constexpr, FILL: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Let the keys meet WIDTH rows; ``state`` is the sums of dk and dv."""
    dk, dv = state
    qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr, delta_ptr = ptrs
    row = first + tl.arange(0, WIDTH)
    place = load_places(place_ptr, row, N)
    q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, WHOLE)
    dout = load_at(dout_ptr, place, C, fill_ptr, d, False, WHOLE)
    lse, delta = _load_statistics(lse_ptr, delta_ptr, row, N)
    bias = bias_tile(bias_ptr, FIRST_KEY, k.shape[0], first, WIDTH, COLUMNS, FRAGMENTS)
    inverse = inverse_norms(q) if COSINE else lse
    factor_q = inverse * factor
    scores = scores_of_tile(k, q, inverse_k, factor_q, bias, region_ptr, key, row, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    p *= tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :]
    dk = tl.dot(p.to(q.dtype), _direction(q, inverse, COSINE), dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _differentiate_keys(
    ptrs, dqkv_ptr, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of this program's part of the keys of a window; give the sums of the pads' dk and dv (d,)."""
    qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr, delta_ptr = ptrs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    d = tl.arange(0, D)
    dfill_k, dfill_v = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for block in range(split * BLOCKS // splits, (split + 1) * BLOCKS // splits):
        key = block * ROWS + tl.arange(0, ROWS)
        place = load_places(place_ptr, key, N)
        k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, False)
        v = load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, False)
        inverse = inverse_norms(k) if COSINE else key.to(tl.float32)
        state = (tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32))
        # fmt: off
        for chunk in range(CHUNKS):
            state = _key_chunk(k, v, inverse, key, state, ptrs, chunk * WIDTH, C, d, factor, scale, block * ROWS,
                               WIDTH, WHOLE, COLUMNS, N, FRAGMENTS, FILL, COSINE, PRECISION, EDGE)
        if TAIL > 0:
            state = _key_chunk(k, v, inverse, key, state, ptrs, CHUNKS * WIDTH, C, d, factor, scale, block * ROWS,
                               TAIL, not PADS and COLUMNS == N, COLUMNS, N, FRAGMENTS, FILL, COSINE,
                               PRECISION, EDGE)
        # fmt: on
        dk, dv = state
        dk *= factor
        if COSINE:
            dk, _ = _through_norm(dk, k, inverse)
        store_at(dqkv_ptr + C, place, 3 * C, dk, d, False)
        store_at(dqkv_ptr + 2 * C, place, 3 * C, dv, d, False)
        if FILL:
            pad = (place == PAD)[:, None]
            dfill_k += tl.sum(tl.where(pad, dk, 0.0), 0)
            dfill_v += tl.sum(tl.where(pad, dv, 0.0), 0)
    return dfill_k, dfill_v


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_dkdv_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), transposed, divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    dout_ptr,  # (B, T, H, W, h, d)
    dqkv_ptr,  # (B, T, H, W, 3, h, d), the last two thirds written
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32
    dfill_partial_ptr,  # (B*M*splits, 3, h, d) float32; written if FILL
    tokens,  # T*H*W
    num_windows,  # M
    num_heads,
    splits,  # programs that share the keys of a window
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    head, split, window, b, m = this_program(num_heads, splits, num_windows)
    C, d = num_heads * D, tl.arange(0, D)
    first_token, statistic = b.to(tl.int64) * tokens, (window.to(tl.int64) * num_heads + head) * N
    qkv_ptr, dqkv_ptr = qkv_ptr + first_token * (3 * C) + head * D, dqkv_ptr + first_token * (3 * C) + head * D
    dout_ptr += first_token * C + head * D
    fill_ptr += head * D
    bias_ptr += head * (ROWS * BLOCKS * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr + statistic, delta_ptr + statistic)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        dfill_k, dfill_v = _differentiate_keys(
            ptrs, dqkv_ptr, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS, TAIL, FRAGMENTS,
            FILL, PADS, COSINE, PRECISION, True)
    else:
        dfill_k, dfill_v = _differentiate_keys(
            ptrs, dqkv_ptr, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS, TAIL, FRAGMENTS,
            False, False, COSINE, PRECISION, False)
    # fmt: on
    if FILL:
        # A pad is nobody's query that counts: its dq is zero.
        partial = dfill_partial_ptr + (window * splits + split).to(tl.int64) * (3 * C) + head * D + d
        tl.store(partial, tl.zeros((D,), tl.float32))
        tl.store(partial + C, dfill_k)
        tl.store(partial + 2 * C, dfill_v)


@triton.jit
def _bias_gradient_of_window(
    ptrs, bias, row, key, C, d, factor, scale, N: tl.constexpr, WHOLE: tl.constexpr, FILL: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Give the gradient of a tile of the scores of one window, of rows ``row`` and keys ``key``."""
    qkv_ptr, fill_ptr, place_ptr, region_ptr, dout_ptr, lse_ptr, delta_ptr = ptrs
    place = load_places(place_ptr, row, N)
    q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, False)
    dout = load_at(dout_ptr, place, C, fill_ptr, d, False, False)
    lse, delta = _load_statistics(lse_ptr, delta_ptr, row, N)
    place = load_places(place_ptr, key, N)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    v = load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)
    factor_q, factor_k = (inverse_norms(q) * factor, inverse_norms(k)) if COSINE else (lse, lse)
    scores = scores_of_tile(q, k, factor_q, factor_k, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[:, None])
    return p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def _bias_gradient_tile(
    ptrs, first_row, first, head, num_heads, run, num_runs, tokens, num_windows, count, scale, N: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, FITS: tl.constexpr,
    COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr, FILL: tl.constexpr, PADS: tl.constexpr, HAS_EDGES: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of ROWS x WIDTH of the bias over this run's windows, and store it."""
    qkv_ptr, bias_ptr, fill_ptr, logit_scale_ptr, place_ptr, region_ptr, edge_ptr, dout_ptr = ptrs[:8]
    lse_ptr, delta_ptr, dbias_partial_ptr = ptrs[8:]
    C, d = num_heads * D, tl.arange(0, D)
    row, key = first_row + tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    bias = bias_tile(bias_ptr, first_row, ROWS, first, WIDTH, COLUMNS, FRAGMENTS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    start, stop = span_of_run(count, run, num_runs)
    window = start
    for _ in range(start, stop):
        b, m = window // num_windows, window % num_windows
        first_token = b.to(tl.int64) * tokens
        statistic = (window.to(tl.int64) * num_heads + head) * N
        here = (qkv_ptr + first_token * (3 * C), fill_ptr, place_ptr + m * N, region_ptr + m * N,
                dout_ptr + first_token * C, lse_ptr + statistic, delta_ptr + statistic)  # fmt: skip
        # fmt: off
        if HAS_EDGES and tl.load(edge_ptr + m) != 0:
            total += _bias_gradient_of_window(here, bias, row, key, C, d, factor, log2_scale, N, FITS and not PADS,
                                              FILL, COSINE, PRECISION, True)
        else:
            total += _bias_gradient_of_window(here, bias, row, key, C, d, factor, log2_scale, N, FITS, False, COSINE,
                                              PRECISION, False)
        # fmt: on
        window += 1
    partial = dbias_partial_ptr + (run * num_heads + head).to(tl.int64) * (ROWS * BLOCKS * COLUMNS)
    tl.store(partial + row[:, None] * COLUMNS + key[None, :], total)


@triton.jit(do_not_specialize=["tokens", "num_windows", "num_heads", "num_runs", "count"])
def _window_attention_long_bias_grad_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    dout_ptr,  # (B, T, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32
    dbias_partial_ptr,  # (runs, h, ROWS*BLOCKS, COLUMNS) float32
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
    ACROSS: tl.constexpr = CHUNKS + 1 if TAIL > 0 else CHUNKS
    tile, rest = tl.program_id(0) % (BLOCKS * ACROSS), tl.program_id(0) // (BLOCKS * ACROSS)
    head, run = rest % num_heads, rest // num_heads
    first_row, chunk = tile // ACROSS * ROWS, tile % ACROSS
    # fmt: off
    ptrs = (qkv_ptr + head * D, bias_ptr + head * (ROWS * BLOCKS * COLUMNS), fill_ptr + head * D, logit_scale_ptr,
            place_ptr, region_ptr, edge_ptr, dout_ptr + head * D, lse_ptr, delta_ptr, dbias_partial_ptr)
    if TAIL > 0 and chunk == CHUNKS:
        _bias_gradient_tile(ptrs, first_row, CHUNKS * WIDTH, head, num_heads, run, num_runs, tokens, num_windows, count,
                            scale, N, D, ROWS, BLOCKS, TAIL, COLUMNS == N, COLUMNS, FRAGMENTS, FILL, PADS, HAS_EDGES,
                            COSINE, PRECISION)
    elif CHUNKS > 0:
        _bias_gradient_tile(ptrs, first_row, chunk * WIDTH, head, num_heads, run, num_runs, tokens, num_windows, count,
                            scale, N, D, ROWS, BLOCKS, WIDTH, WIDTH * CHUNKS <= N, COLUMNS, FRAGMENTS, FILL, PADS,
                            HAS_EDGES, COSINE, PRECISION)
    # fmt: on


def long_backward(
    call: WindowCall, grad_out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dqkv, the partial sums of the gradients of the N x N bias and of what pads hold, and of ``logit_scale``.

    What ``needs``, in the order of ``window_attention_bwd``, does not ask for may be left out.
    """
    tiles, item = tiles_of(call, 64), call.qkv.dtype
    default = config_of_tiles(tiles, call.head_dim)
    config = call.config("window_attention_long_bwd", call.tokens, default)
    splits = splits_of(call, config, tiles.blocks)
    programs = call.windows * splits
    dqkv, delta = torch.empty_like(call.qkv), torch.empty_like(lse)
    dlog_partial = call.partial(*((programs, call.num_heads) if call.logit_scale is not None else (0,)))
    dfill_partial = call.partial(*((programs, call.qkv.shape[-1]) if call.fills else (0,)))
    dbias_partial = call.partial(0, call.num_heads, tiles.rows * tiles.blocks, tiles.columns)
    if programs > 0:
        expanded, windows = call.expand(tiles.form(item)), windows_of(call)
        inputs = (call.fill, call.qkv if call.logit_scale is None else call.logit_scale, *windows)
        maps = (math.prod(call.size), call.windows_per_map, call.num_heads)
        constants = (call.tokens, call.head_dim, *tiles.constants, *flags_of(call))
        arguments = (*maps, splits, call.scale, *constants)
        gradients = (grad_out, dqkv, lse, delta)
        grid = (programs * call.num_heads,)
        _window_attention_long_dq_kernel[grid](
            call.qkv, expanded, *inputs, *gradients, dlog_partial, *arguments, **config.options
        )
        if needs[0] or needs[3]:
            turned = call.expand(tiles.form(item, transposed=True))
            _window_attention_long_dkdv_kernel[grid](
                call.qkv, turned, *inputs, *gradients, dfill_partial, *arguments, **config.options
            )
        if needs[1] or needs[2]:
            config = call.config("window_attention_long_bias_grad", call.tokens, default)
            across = tiles.blocks * (tiles.chunks + (tiles.tail > 0)) * call.num_heads
            bytes_per_run = 4 * call.num_heads * tiles.rows * tiles.blocks * tiles.columns
            runs = max(1, min(call.runs(config, across), SCRATCH_BYTES // bytes_per_run))
            dbias_partial = call.partial(runs, *dbias_partial.shape[1:])
            _window_attention_long_bias_grad_kernel[(across * runs,)](
                call.qkv,
                expanded,
                *inputs,
                grad_out,
                lse,
                delta,
                dbias_partial,
                *maps,
                runs,
                call.windows,
                call.scale,
                *constants,
                **config.options,
            )
    dlogit_scale = None
    if call.logit_scale is not None:
        # The clamp passes the gradient at its border, as torch.clamp does.
        summed = dlog_partial.sum(0).view_as(call.logit_scale)
        dlogit_scale = torch.where(call.logit_scale <= MAX_LOG_SCALE.value, summed, 0).to(call.logit_scale.dtype)
    return dqkv, dbias_partial, dfill_partial, dlogit_scale
