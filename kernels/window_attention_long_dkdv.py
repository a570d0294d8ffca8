"""The gradients of k and v in the backward of ``window_attention_long``.

Its tiles are transposed, keys by queries, from a transposed bias, so that no product has a transposed product on its
left, which some Triton versions get wrong on Hopper. Bytes of a window and head, at 2 bytes an element: 12 N d.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import triton
import triton.language as tl

from florence_fast.kernels.window_attention_long_dq import through_norm
from florence_fast.kernels.window_attention_long_tiles import (
    SIZES,
    blocks_of_split,
    directions,
    inverse_norms,
    load_at,
    load_places,
    load_statistic,
    scale_of,
    scores_of_tile,
    store_at,
    this_program,
)
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile
from florence_fast.kernels.window_index import PAD


@triton.jit
def _load_queries(
    ptrs, first, C, d, WIDTH: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, FILL: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Load WIDTH queries from ``first`` on, as ``directions`` gives them, and dout."""
    qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr, delta_ptr = ptrs
    place = load_places(place_ptr, first + tl.arange(0, WIDTH), N, WHOLE)
    q, q_rest = directions(load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, WHOLE), COSINE)
    return q, q_rest, load_at(dout_ptr, place, C, fill_ptr, d, False, WHOLE)


@triton.jit
def _meet_queries(
    k, v, inverse, factor, key, state, queries, ptrs, first, scale, FIRST_KEY, WITHIN: tl.constexpr,
    COLUMNS: tl.constexpr, N: tl.constexpr, FRAGMENTS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Let the keys meet some queries, all WITHIN the window or not; ``state`` is the sums of dk and dv."""
    dk, dv = state
    q, q_rest, dout = queries
    qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr, delta_ptr = ptrs
    row = first + tl.arange(0, q.shape[0])
    lse = load_statistic(lse_ptr, row, N, float("inf"), WITHIN)
    delta = load_statistic(delta_ptr, row, N, 0.0, WITHIN)
    bias = bias_tile(bias_ptr, FIRST_KEY, k.shape[0], first, q.shape[0], COLUMNS, FRAGMENTS)
    scores = scores_of_tile(k, q, q_rest, inverse, factor, bias, region_ptr, key, row, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    p *= tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :]
    dk = tl.dot(p.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _differentiate_block(
    ptrs, dqkv_ptr, queries, first_key, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WITHIN: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of ROWS keys of a window, all WITHIN it or not; give the sums of the pads' dk and dv (d,)."""
    qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr, delta_ptr = ptrs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = WITHIN and not PADS
    WHOLE_QUERIES: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    key, d = first_key + tl.arange(0, ROWS), tl.arange(0, D)
    place = load_places(place_ptr, key, N, WITHIN)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    v = load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)
    inverse = inverse_norms(k) if COSINE else key.to(tl.float32)
    state = (tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32))
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            if len(queries) > 0:
                met = queries[chunk]
            else:
                met = _load_queries(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_QUERIES, N, FILL, COSINE)
            state = _meet_queries(k, v, inverse, factor, key, state, met, ptrs, chunk * WIDTH, scale, first_key,
                                  WIDTH * CHUNKS <= N, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
    else:
        for chunk in range(CHUNKS):
            met = _load_queries(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_QUERIES, N, FILL, COSINE)
            state = _meet_queries(k, v, inverse, factor, key, state, met, ptrs, chunk * WIDTH, scale, first_key,
                                  WIDTH * CHUNKS <= N, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
    if TAIL > 0:
        if len(queries) > 0:
            tail = queries[CHUNKS]
        else:
            tail = _load_queries(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
        state = _meet_queries(k, v, inverse, factor, key, state, tail, ptrs, CHUNKS * WIDTH, scale, first_key,
                              COLUMNS == N, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
    # fmt: on
    dk, dv = state
    dk *= factor
    if COSINE:
        dk, _ = through_norm(dk, k, inverse)
    store_at(dqkv_ptr + C, place, 3 * C, dk, d, WHOLE)
    store_at(dqkv_ptr + 2 * C, place, 3 * C, dv, d, WHOLE)
    dfill_k, dfill_v = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    if FILL:
        pad = (place == PAD)[:, None]
        dfill_k, dfill_v = tl.sum(tl.where(pad, dk, 0.0), 0), tl.sum(tl.where(pad, dv, 0.0), 0)
    return dfill_k, dfill_v


@triton.jit
def _differentiate_keys(
    ptrs, dqkv_ptr, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr, FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr, CUT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of this program's part of the keys of a window; give the sums of the pads' dk and dv (d,)."""
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    d, queries = tl.arange(0, D), ()
    dfill_k, dfill_v = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            loaded = _load_queries(ptrs, chunk * WIDTH, C, d, WIDTH, not PADS and WIDTH * CHUNKS <= N, N, FILL, COSINE)
            queries = queries + (loaded,)  # noqa: RUF005
        if TAIL > 0:
            loaded = _load_queries(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
            queries = queries + (loaded,)  # noqa: RUF005
    first, stop, at_end = blocks_of_split(split, splits, BLOCKS, CUT)
    for block in range(first, stop):
        of_k, of_v = _differentiate_block(ptrs, dqkv_ptr, queries, block * ROWS, C, factor, scale, N, D, ROWS,
                                          ROWS * BLOCKS <= N, WIDTH, CHUNKS, TAIL, FRAGMENTS, FILL, PADS, COSINE,
                                          PRECISION, RESIDENT, EDGE)
        dfill_k += of_k
        dfill_v += of_v
    if LAST > 0 and at_end:
        # Its products have other layouts. It loads the queries anew, for else they would wait in registers.
        of_k, of_v = _differentiate_block(ptrs, dqkv_ptr, (), ROWS * BLOCKS, C, factor, scale, N, D, LAST,
                                          ROWS * BLOCKS + LAST == N, WIDTH, CHUNKS, TAIL, False, FILL, PADS, COSINE,
                                          PRECISION, RESIDENT, EDGE)
        dfill_k += of_k
        dfill_v += of_v
    # fmt: on
    return dfill_k, dfill_v


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_dkdv_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS + LAST, COLUMNS), transposed, divided by scale, if that is not of cosines
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
    RESIDENT: tl.constexpr,  # whether all queries of the window stay in shared memory, with dout
    CUT: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    head, split, window, b, m = this_program(num_heads, splits, num_windows, CUT)
    C, d = num_heads * D, tl.arange(0, D)
    first_token, statistic = b.to(tl.int64) * tokens, (window.to(tl.int64) * num_heads + head) * N
    qkv_ptr, dqkv_ptr = qkv_ptr + first_token * (3 * C) + head * D, dqkv_ptr + first_token * (3 * C) + head * D
    dout_ptr += first_token * C + head * D
    fill_ptr += head * D
    bias_ptr += head * ((ROWS * BLOCKS + LAST) * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, dout_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, lse_ptr + statistic, delta_ptr + statistic)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        dfill_k, dfill_v = _differentiate_keys(
            ptrs, dqkv_ptr, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH, CHUNKS, TAIL,
            FRAGMENTS, FILL, PADS, COSINE, PRECISION, RESIDENT, CUT, True)
    else:
        dfill_k, dfill_v = _differentiate_keys(
            ptrs, dqkv_ptr, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH, CHUNKS, TAIL,
            FRAGMENTS, False, False, COSINE, PRECISION, RESIDENT, CUT, False)
    # fmt: on
    if FILL:
        # A pad is nobody's query that counts: its dq is zero.
        partial = dfill_partial_ptr + (window * splits + split).to(tl.int64) * (3 * C) + head * D + d
        tl.store(partial, tl.zeros((D,), tl.float32))
        tl.store(partial + C, dfill_k)
        tl.store(partial + 2 * C, dfill_v)
