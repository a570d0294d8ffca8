"""Window attention for windows in 3-D, of more than 144 tokens, and by cosines: the rows and the keys in parts.

What ``window_attention`` says holds here too, except that a program owns one head of one window, or some of its rows,
and goes through blocks of 64 rows; each meets the keys in chunks, with a softmax that is corrected as it goes. Where
a window's tokens lie is read from the list of ``window_index``, for the arithmetic of three axes would cost as much
as the softmax. The bias is read per tile as ``window_attention_tall`` reads it. The forward of a training step keeps
the log-sum-exp of each row, in base 2.

Cosine attention (Swin V2) has a factor exp(min(logit_scale, log 100)), after which a cosine rounded to 16 bits would be
wrong by 0.2. So a key comes as its direction and what rounding that left over, in 16 bits each, and the inverse norm of
a query is a factor of its row.

Bytes of a window and head, at 2 bytes an element: forward 8 N d. Exponentials bind before them from N = 221 on an
H200 and 366 on an A100: N^2 / 16 clocks of a multiprocessor.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.window_attention_long_tiles import (
    SIZES,
    add_row_sums,
    blocks_of_split,
    config_of_tiles,
    directions,
    flags_of,
    inverse_norms,
    keeps_tokens,
    load_at,
    load_places,
    no_row_sums,
    scale_of,
    scores_of_tile,
    splits_of,
    store_at,
    sums_by_product,
    this_program,
    tiles_of,
    windows_of,
)
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile, fast_log2
from florence_fast.kernels.window_call import WindowCall

_LOWEST = tl.constexpr(-1e25)
"""Where maxima start: above what hides a key, so that keys which are all hidden count as nothing, not as equals.

From their own maximum they would be a rounding error of it away, which may be 1e22, and whose power of 2 infinite.
"""


@triton.jit
def _load_chunk(
    ptrs, first, C, d, WIDTH: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, FILL: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Load WIDTH keys from ``first`` on, as ``directions`` gives them, and their values."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    place = load_places(place_ptr, first + tl.arange(0, WIDTH), N, WHOLE)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    k, k_rest = directions(k, COSINE)
    return k, k_rest, load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)


@triton.jit
def _attend_chunk(
    q, keys, factor, row, state, ptrs, first, scale, FIRST_ROW, COLUMNS: tl.constexpr, N: tl.constexpr,
    FRAGMENTS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Let the rows meet the keys from ``first`` on; ``state`` is their maxima, sums and results so far."""
    top, total, out = state
    k, k_rest, v = keys
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    key = first + tl.arange(0, k.shape[0])
    bias = bias_tile(bias_ptr, FIRST_ROW, q.shape[0], first, k.shape[0], COLUMNS, FRAGMENTS)
    scores = scores_of_tile(q, k, k_rest, factor, 1.0, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    correction = tl.exp2(top - new_top)
    if SUM_BY_PRODUCT:
        total = add_row_sums(p.to(v.dtype), total * correction[:, None], True, PRECISION)
    else:
        total = add_row_sums(p, total * correction, False, PRECISION)
    out = tl.dot(p.to(v.dtype), v, out * correction[:, None], input_precision=PRECISION)
    return new_top, total, out


@triton.jit
def _attend_block(
    ptrs, keys, first_row, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WITHIN: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    KEEP_LSE: tl.constexpr, FAST_LOG2: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Attend from ROWS rows of a window, all of them WITHIN it or not, to all its keys."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = WITHIN and not PADS
    WHOLE_KEYS: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    row, d = first_row + tl.arange(0, ROWS), tl.arange(0, D)
    place = load_places(place_ptr, row, N, WITHIN)
    q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, WHOLE)
    factor_q = inverse_norms(q) * factor if COSINE else row.to(tl.float32)
    state = (
        tl.full((ROWS,), _LOWEST, tl.float32),
        no_row_sums(ROWS, SUM_BY_PRODUCT),
        tl.zeros((ROWS, D), tl.float32),
    )
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            if len(keys) > 0:
                met = keys[chunk]
            else:
                met = _load_chunk(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_KEYS, N, FILL, COSINE)
            state = _attend_chunk(q, met, factor_q, row, state, ptrs, chunk * WIDTH, scale, first_row,
                                  COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT, EDGE)
    else:
        for chunk in range(CHUNKS):
            met = _load_chunk(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE_KEYS, N, FILL, COSINE)
            state = _attend_chunk(q, met, factor_q, row, state, ptrs, chunk * WIDTH, scale, first_row,
                                  COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT, EDGE)
    if TAIL > 0:
        if len(keys) > 0:
            tail = keys[len(keys) - 1]
        else:
            tail = _load_chunk(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
        state = _attend_chunk(q, tail, factor_q, row, state, ptrs, CHUNKS * WIDTH, scale, first_row,
                              COLUMNS, N, FRAGMENTS, COSINE, PRECISION, SUM_BY_PRODUCT, EDGE)
    # fmt: on
    top, total, out = state
    if SUM_BY_PRODUCT:
        total = tl.max(total, 1)
    store_at(out_ptr, place, C, out * (1.0 / total)[:, None], d, WHOLE)
    if KEEP_LSE:
        tl.store(lse_ptr + row, top + fast_log2(total, FAST_LOG2), mask=row < N)


@triton.jit
def _attend_rows(
    ptrs, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LAST: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr, PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    KEEP_LSE: tl.constexpr, FAST_LOG2: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr, CUT: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Attend from this program's part of the rows of a window to all its keys."""
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    d, keys = tl.arange(0, D), ()
    # fmt: off
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            keys = keys + (_load_chunk(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE, N, FILL, COSINE),)  # noqa: RUF005
    if TAIL > 0:
        tail = _load_chunk(ptrs, CHUNKS * WIDTH, C, d, TAIL, not PADS and COLUMNS == N, N, FILL, COSINE)
        keys = keys + (tail,)  # noqa: RUF005
    first, stop, at_end = blocks_of_split(split, splits, BLOCKS, CUT)
    for block in range(first, stop):
        _attend_block(ptrs, keys, block * ROWS, C, factor, scale, N, D, ROWS, ROWS * BLOCKS <= N, WIDTH, CHUNKS, TAIL,
                      FRAGMENTS, FILL, PADS, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2, SUM_BY_PRODUCT, EDGE)
    if LAST > 0 and at_end:
        # Its products have other layouts. It loads the keys anew, for else they would wait for it in registers.
        _attend_block(ptrs, (), ROWS * BLOCKS, C, factor, scale, N, D, LAST, ROWS * BLOCKS + LAST == N, WIDTH,
                      CHUNKS, TAIL, False, FILL, PADS, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2,
                      SUM_BY_PRODUCT, EDGE)
    # fmt: on


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_fwd_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS + LAST, COLUMNS), divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    out_ptr,  # (B, T, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32; written if KEEP_LSE
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
    KEEP_LSE: tl.constexpr,
    FAST_LOG2: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    CUT: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    head, split, window, b, m = this_program(num_heads, splits, num_windows, CUT)
    C = num_heads * D
    first_token = b.to(tl.int64) * tokens
    qkv_ptr += first_token * (3 * C) + head * D
    out_ptr += first_token * C + head * D
    fill_ptr += head * D
    bias_ptr += head * ((ROWS * BLOCKS + LAST) * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    lse_ptr += (window.to(tl.int64) * num_heads + head) * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        _attend_rows(ptrs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH, CHUNKS, TAIL,
                     FRAGMENTS, FILL, PADS, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2, SUM_BY_PRODUCT, CUT, True)
    else:
        _attend_rows(ptrs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, LAST, WIDTH, CHUNKS, TAIL,
                     FRAGMENTS, False, False, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2, SUM_BY_PRODUCT,
                     CUT, False)
    # fmt: on


def long_forward(call: WindowCall, out: Tensor, lse: Tensor | None) -> None:
    """Attend, and leave the log-sum-exp of each row in ``lse`` if it is given."""
    tiles = tiles_of(call, 128)
    config = call.config("window_attention_long_fwd", call.tokens, config_of_tiles(tiles, call.head_dim))
    splits = splits_of(call, config, tiles.blocks)
    _window_attention_long_fwd_kernel[(call.windows * splits * call.num_heads,)](
        call.qkv,
        call.expand(tiles.form(call.qkv.dtype)),
        call.fill,
        call.qkv if call.logit_scale is None else call.logit_scale,
        *windows_of(call),
        out,
        out if lse is None else lse,
        math.prod(call.size),
        call.windows_per_map,
        call.num_heads,
        splits,
        call.scale,
        call.tokens,
        call.head_dim,
        *tiles.constants,
        *flags_of(call),
        keeps_tokens(call, tiles, 2),
        lse is not None,
        call.qkv.device.type != "cpu",
        sums_by_product(call),
        splits > 1,
        **config.options,
    )
