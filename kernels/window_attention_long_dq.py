"""The gradient of q in the backward of ``window_attention_long``, and delta, the sum of p dp of a row.

It meets each key once: with any constant c of a row, sum p (dp - delta) k = sum p (dp - c) k - (delta - c) sum p k,
and c near delta, from the first chunk of keys, leaves nothing to cancel. Bytes of a window and head, at 2 bytes an
element: 10 N d.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import triton
import triton.language as tl

from florence_fast.kernels.window_attention_long_tiles import (
    SIZES,
    add_row_sums,
    blocks_of_split,
    directions,
    inverse_norms,
    load_at,
    load_places,
    load_statistic,
    no_row_sums,
    scale_of,
    scores_of_tile,
    store_at,
    this_program,
)
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile


@triton.jit
def through_norm(dx, x, inverse):
    """Turn the gradient of x/|x| (n, d) into that of x; give also its part along x (n,)."""
    x = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(dx * x, 1)
    return (dx - x * along[:, None]) * inverse[:, None], along


@triton.jit
def _load_keys(
    ptrs, first, C, d, WIDTH: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, FILL: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Load WIDTH keys from ``first`` on, as ``directions`` gives them, and their values."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr = ptrs
    place = load_places(place_ptr, first + tl.arange(0, WIDTH), N, WHOLE)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    k, k_rest = directions(k, COSINE)
    return k, k_rest, load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)


@triton.jit
def _meet_keys(
    q, dout, lse, factor, row, centre, state, keys, ptrs, first, scale, FIRST_ROW, FIRST: tl.constexpr,
    COLUMNS: tl.constexpr, N: tl.constexpr, FRAGMENTS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Let the rows meet some keys; ``state`` is the sums of p (dp - c) k, p k and p (dp - c); ``centre`` is c."""
    spread_keys, sum_keys, spread = state
    k, k_rest, v = keys
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr = ptrs
    key = first + tl.arange(0, k.shape[0])
    bias = bias_tile(bias_ptr, FIRST_ROW, q.shape[0], first, k.shape[0], COLUMNS, FRAGMENTS)
    scores = scores_of_tile(q, k, k_rest, factor, 1.0, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    p = tl.exp2(scores * scale - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if FIRST:
        centre = tl.sum(p * dp, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
    sum_keys = tl.dot(p.to(k.dtype), k, sum_keys, input_precision=PRECISION)
    p *= dp - centre[:, None]
    spread = add_row_sums(p.to(k.dtype) if SUM_BY_PRODUCT else p, spread, SUM_BY_PRODUCT, PRECISION)
    spread_keys = tl.dot(p.to(k.dtype), k, spread_keys, input_precision=PRECISION)
    return centre, (spread_keys, sum_keys, spread)


@triton.jit
def _differentiate_block(
    ptrs, outs, keys, first_row, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WITHIN: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of ROWS rows of a window, all WITHIN it or not; give their part of dlogit_scale."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr = ptrs
    dout_ptr, dqkv_ptr, lse_ptr, delta_ptr = outs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = WITHIN and not PADS
    WHOLE_KEYS: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    row, d = first_row + tl.arange(0, ROWS), tl.arange(0, D)
    place = load_places(place_ptr, row, N, WITHIN)
    q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, WHOLE)
    dout = load_at(dout_ptr, place, C, fill_ptr, d, False, WHOLE)
    lse = load_statistic(lse_ptr, row, N, float("inf"), WITHIN)
    inverse = inverse_norms(q) if COSINE else lse
    factor_q = inverse * factor
    centre, none = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    state = (none, none, no_row_sums(ROWS, SUM_BY_PRODUCT))
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            if len(keys) > 0:
                met = keys[chunk]
            else:
                met = _load_keys(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_KEYS, N, FILL, COSINE)
            centre, state = _meet_keys(q, dout, lse, factor_q, row, centre, state, met, ptrs, chunk * WIDTH, scale,
                                       first_row, chunk == 0, COLUMNS, N, FRAGMENTS, COSINE, PRECISION,
                                       SUM_BY_PRODUCT, EDGE)
    elif CHUNKS > 0:
        met = _load_keys(ptrs, 0, C, d, WIDTH, WHOLE_KEYS, N, FILL, COSINE)
        centre, state = _meet_keys(q, dout, lse, factor_q, row, centre, state, met, ptrs, 0, scale, first_row, True,
                                   COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT, EDGE)
        for chunk in range(1, CHUNKS):
            met = _load_keys(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_KEYS, N, FILL, COSINE)
            centre, state = _meet_keys(q, dout, lse, factor_q, row, centre, state, met, ptrs, chunk * WIDTH, scale,
                                       first_row, False, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT,
                                       EDGE)
    if TAIL > 0:
        if len(keys) > 0:
            tail = keys[CHUNKS]
        else:
            tail = _load_keys(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
        centre, state = _meet_keys(q, dout, lse, factor_q, row, centre, state, tail, ptrs, CHUNKS * WIDTH, scale,
                                   first_row, CHUNKS == 0, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT,
                                   EDGE)
    # fmt: on
    spread_keys, sum_keys, spread = state
    if SUM_BY_PRODUCT:
        spread = tl.max(spread, 1)
    tl.store(delta_ptr + row, centre + spread, mask=row < N)
    dq = (spread_keys - spread[:, None] * sum_keys) * factor
    dlog = 0.0
    if COSINE:
        dq, along = through_norm(dq, q, inverse)
        dlog = tl.sum(along, 0)
    store_at(dqkv_ptr, place, 3 * C, dq, d, WHOLE)
    return dlog


@triton.jit
def _differentiate_rows(
    ptrs, outs, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr, FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr, CUT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of this program's part of a window's rows; give their part of dlogit_scale."""
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    d, keys, dlog = tl.arange(0, D), (), 0.0
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            loaded = _load_keys(ptrs, chunk * WIDTH, C, d, WIDTH, not PADS and WIDTH * CHUNKS <= N, N, FILL, COSINE)
            keys = keys + (loaded,)  # noqa: RUF005
        if TAIL > 0:
            loaded = _load_keys(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
            keys = keys + (loaded,)  # noqa: RUF005
    first, stop, at_end = blocks_of_split(split, splits, BLOCKS, CUT)
    for block in range(first, stop):
        dlog += _differentiate_block(ptrs, outs, keys, block * ROWS, C, factor, scale, N, D, ROWS, ROWS * BLOCKS <= N,
                                     WIDTH, CHUNKS, TAIL, FRAGMENTS, FILL, PADS, COSINE, PRECISION, RESIDENT,
                                     SUM_BY_PRODUCT, EDGE)
    if LAST > 0 and at_end:
        # Its products have other layouts. It loads the keys anew, for else they would wait for it in registers.
        dlog += _differentiate_block(ptrs, outs, (), ROWS * BLOCKS, C, factor, scale, N, D, LAST,
                                     ROWS * BLOCKS + LAST == N, WIDTH, CHUNKS, TAIL, False, FILL, PADS, COSINE,
                                     PRECISION, RESIDENT, SUM_BY_PRODUCT, EDGE)
    # fmt: on
    return dlog


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_dq_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS + LAST, COLUMNS), divided by scale, if that is not of cosines
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
    RESIDENT: tl.constexpr,  # whether all keys and values of the window stay in shared memory
    SUM_BY_PRODUCT: tl.constexpr,
    CUT: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    head, split, window, b, m = this_program(num_heads, splits, num_windows, CUT)
    C = num_heads * D
    first_token, statistic = b.to(tl.int64) * tokens, (window.to(tl.int64) * num_heads + head) * N
    qkv_ptr, dqkv_ptr = qkv_ptr + first_token * (3 * C) + head * D, dqkv_ptr + first_token * (3 * C) + head * D
    dout_ptr += first_token * C + head * D
    bias_ptr += head * ((ROWS * BLOCKS + LAST) * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, bias_ptr, fill_ptr + head * D, place_ptr, region_ptr)
    outs = (dout_ptr, dqkv_ptr, lse_ptr + statistic, delta_ptr + statistic)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        dlog = _differentiate_rows(ptrs, outs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH,
                                   CHUNKS, TAIL, FRAGMENTS, FILL, PADS, COSINE, PRECISION, RESIDENT, SUM_BY_PRODUCT,
                                   CUT, True)
    else:
        dlog = _differentiate_rows(ptrs, outs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH,
                                   CHUNKS, TAIL, FRAGMENTS, False, False, COSINE, PRECISION, RESIDENT, SUM_BY_PRODUCT,
                                   CUT, False)
    # fmt: on
    if COSINE:
        tl.store(dlog_partial_ptr + tl.program_id(0), dlog)
