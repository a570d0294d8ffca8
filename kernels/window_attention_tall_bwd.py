"""The backward of window attention for 64 < N <= 144 tokens a window: see ``window_attention_tall``.

Letters: B batch · H W map height and width · C channels · M windows of one map · N tokens in one window · h heads ·
d head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import BiasForm
from florence_fast.kernels.window_attention_tall import (
    LOG2_E,
    bias_tile,
    block_rows,
    key_columns,
    tile_scores,
)
from florence_fast.kernels.window_call import WindowCall
from florence_fast.kernels.window_index import (
    GEOMETRY,
    count_windows,
    first_token,
    grid_of,
    load_tokens,
    locate_window,
    next_window,
    place_tokens,
    span_of_run,
    store_tokens,
)


@triton.jit
def _add_product(total, x, y, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """Add x^T y to ``total``, or its transpose y^T x, which has what comes from memory on the left."""
    if TRANSPOSED:
        return tl.dot(tl.trans(y), x, total, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(x), y, total, input_precision=PRECISION)


@triton.jit
def _backward_rows(
    first_row,
    ptrs,
    keys,
    sums,
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
    PRECISION: tl.constexpr,
    SAFE_DOTS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Differentiate ROWS rows of a window: write dq and delta, give ``sums`` (dk, dv by part) with their part."""
    q_ptr, fill_ptr, bias_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr = ptrs
    B, H, W, C, shift_h, shift_w = geometry
    b, wy, wx = at
    row, d = first_row + tl.arange(0, ROWS), tl.arange(0, D)
    valid = row < WH * WW
    WHOLE: tl.constexpr = WHOLE_ROWS and not (EDGE and RAGGED)
    place, real, region = place_tokens(row, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
    offset, dout_offset = place[:, None] * (3 * C) + d[None, :], place[:, None] * C + d[None, :]
    q = load_tokens(q_ptr, offset, real, valid, fill_ptr, d, FILL and EDGE, WHOLE)
    dout = load_tokens(dout_ptr, dout_offset, real, valid, fill_ptr, d, False, WHOLE)
    lse = tl.load(lse_ptr + row, mask=valid, other=0.0)
    log2_scale = scale * LOG2_E
    bias = bias_tile(bias_ptr, first_row, ROWS, 0, 128, COLUMNS, FRAGMENTS)
    p_0 = tl.exp2(tile_scores(q, keys[0], bias, region, regions[0], EDGE, PRECISION) * log2_scale - lse[:, None])
    dp_0 = tl.dot(dout, tl.trans(keys[1]), input_precision=PRECISION)
    delta = tl.sum(p_0 * dp_0, 1)
    if COLUMNS > 128:
        bias = bias_tile(bias_ptr, first_row, ROWS, 128, COLUMNS - 128, COLUMNS, FRAGMENTS)
        p_1 = tl.exp2(tile_scores(q, keys[2], bias, region, regions[1], EDGE, PRECISION) * log2_scale - lse[:, None])
        dp_1 = tl.dot(dout, tl.trans(keys[3]), input_precision=PRECISION)
        delta += tl.sum(p_1 * dp_1, 1)
    tl.store(delta_ptr + row, delta, mask=valid)
    ds_0 = (p_0 * (dp_0 - delta[:, None])).to(q.dtype)
    dv_0 = _add_product(sums[1], p_0.to(q.dtype), dout, SAFE_DOTS, PRECISION)
    dk_0 = _add_product(sums[0], ds_0, q, SAFE_DOTS, PRECISION)
    dq = tl.dot(ds_0, keys[0], input_precision=PRECISION)
    sums_out = (dk_0, dv_0)
    if COLUMNS > 128:
        ds_1 = (p_1 * (dp_1 - delta[:, None])).to(q.dtype)
        dv_1 = _add_product(sums[3], p_1.to(q.dtype), dout, SAFE_DOTS, PRECISION)
        dk_1 = _add_product(sums[2], ds_1, q, SAFE_DOTS, PRECISION)
        dq = tl.dot(ds_1, keys[2], dq, input_precision=PRECISION)
        sums_out = (dk_0, dv_0, dk_1, dv_1)
    store_tokens(dq_ptr, offset, dq * scale, real, WHOLE)
    return sums_out


@triton.jit
def _zeros(WIDTH: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return tl.zeros((D, WIDTH), tl.float32)
    else:
        return tl.zeros((WIDTH, D), tl.float32)


@triton.jit
def _store_key_gradients(ptr, offset, dk, dv, real, C, scale, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr):
    """Write dk and dv (keys, d) at their places; give them back, dk scaled."""
    if TRANSPOSED:
        dk, dv = tl.trans(dk), tl.trans(dv)
    dk *= scale
    store_tokens(ptr + C, offset, dk, real, WHOLE)
    store_tokens(ptr + 2 * C, offset, dv, real, WHOLE)
    return dk, dv


@triton.jit
def _backward_windows(
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
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAFE_DOTS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Differentiate this run's inner or edge windows; give the sums of the pads' dk and dv (d,)."""
    qkv_ptr, fill_ptr, bias_ptr, dout_ptr, dqkv_ptr, lse_ptr, delta_ptr = ptrs
    B, H, W, C, shift_h, shift_w = geometry
    N: tl.constexpr = WH * WW
    WHOLE: tl.constexpr = N == COLUMNS and not (EDGE and RAGGED)
    WHOLE_ROWS: tl.constexpr = N == ROWS * BLOCKS
    d, i, j = tl.arange(0, D), tl.arange(0, 128), 128 + tl.arange(0, 16)
    dfill_k, dfill_v = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for _ in range(start, stop):
        first = first_token(b, wy, wx, geometry, WH, WW)
        window = (b * grid[0] + wy) * grid[1] + wx
        ptr, dptr = qkv_ptr + first * (3 * C), dqkv_ptr + first * (3 * C)
        place_0, real_0, region_0 = place_tokens(
            i, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE
        )
        offset_0 = place_0[:, None] * (3 * C) + d[None, :]
        k_0 = load_tokens(ptr + C, offset_0, real_0, i < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
        v_0 = load_tokens(ptr + 2 * C, offset_0, real_0, i < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
        keys, regions = (k_0, v_0), (region_0, region_0)
        sums = (_zeros(128, D, SAFE_DOTS), _zeros(128, D, SAFE_DOTS))
        if COLUMNS > 128:
            place_1, real_1, region_1 = place_tokens(
                j, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE
            )
            offset_1 = place_1[:, None] * (3 * C) + d[None, :]
            k_1 = load_tokens(ptr + C, offset_1, real_1, j < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
            v_1 = load_tokens(ptr + 2 * C, offset_1, real_1, j < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
            keys, regions = (k_0, v_0, k_1, v_1), (region_0, region_1)
            narrow = _zeros(16, D, SAFE_DOTS)
            sums = (sums[0], sums[1], narrow, narrow)
        row = (window.to(tl.int64) * num_heads + head) * N
        row_ptrs = (ptr, fill_ptr, bias_ptr, dout_ptr + first * C, dptr, lse_ptr + row, delta_ptr + row)
        # fmt: off
        for block in range(BLOCKS):
            sums = _backward_rows(block * ROWS, row_ptrs, keys, sums, regions, (b, wy, wx), geometry, scale, ROWS,
                                  WHOLE_ROWS, FRAGMENTS, WH, WW, D, COLUMNS, CYCLIC_H, CYCLIC_W, FILL, RAGGED,
                                  PRECISION, SAFE_DOTS, EDGE)
        # fmt: on
        dk, dv = _store_key_gradients(dptr, offset_0, sums[0], sums[1], real_0, C, scale, SAFE_DOTS, WHOLE)
        if FILL and EDGE:
            dfill_k += tl.sum(tl.where(real_0[:, None], 0.0, dk), 0)
            dfill_v += tl.sum(tl.where(real_0[:, None], 0.0, dv), 0)
        if COLUMNS > 128:
            dk, dv = _store_key_gradients(dptr, offset_1, sums[2], sums[3], real_1, C, scale, SAFE_DOTS, WHOLE)
            if FILL and EDGE:
                dfill_k += tl.sum(tl.where(real_1[:, None], 0.0, dk), 0)
                dfill_v += tl.sum(tl.where(real_1[:, None], 0.0, dv), 0)
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)
    return dfill_k, dfill_v


@triton.jit(do_not_specialize=GEOMETRY)
def _window_attention_tall_bwd_kernel(
    qkv_ptr,  # (B, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), divided by scale
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    dout_ptr,  # (B, H, W, h, d)
    dqkv_ptr,  # (B, H, W, 3, h, d)
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32, written
    dfill_partial_ptr,  # (runs, 3, h, d) float32; written if FILL
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
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAFE_DOTS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    head, run, num_runs = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    bias_ptr += head * ROWS * BLOCKS * COLUMNS
    qkv_ptr, fill_ptr, dout_ptr, dqkv_ptr = (
        qkv_ptr + head * D,
        fill_ptr + head * D,
        dout_ptr + head * D,
        dqkv_ptr + head * D,
    )
    ptrs = (qkv_ptr, fill_ptr, bias_ptr, dout_ptr, dqkv_ptr, lse_ptr, delta_ptr)
    geometry = (B, H, W, num_heads * D, shift_h, shift_w)
    # fmt: off
    _backward_windows(ptrs, head, num_heads, geometry, run, num_runs, scale, WH, WW, D, COLUMNS, ROWS, BLOCKS,
                      FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, SAFE_DOTS, False)
    if HAS_EDGES:
        dfill_k, dfill_v = _backward_windows(
            ptrs, head, num_heads, geometry, run, num_runs, scale, WH, WW, D, COLUMNS, ROWS, BLOCKS,
            FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, SAFE_DOTS, True)
        if FILL:
            C, d = num_heads * D, tl.arange(0, D)
            partial = dfill_partial_ptr + run * 3 * C + head * D + d
            tl.store(partial, tl.zeros((D,), tl.float32))
            tl.store(partial + C, dfill_k)
            tl.store(partial + 2 * C, dfill_v)
    # fmt: on


@triton.jit
def _bias_gradient_windows(
    ptrs,
    first_row,
    sums,
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
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add to ``sums`` the gradient of ROWS rows of the bias in this run's inner windows, or in its edge windows."""
    qkv_ptr, fill_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr = ptrs
    B, H, W, C, shift_h, shift_w = geometry
    N: tl.constexpr = WH * WW
    WHOLE: tl.constexpr = N == COLUMNS and not (EDGE and RAGGED)
    d, row, i, j = tl.arange(0, D), first_row + tl.arange(0, ROWS), tl.arange(0, 128), 128 + tl.arange(0, 16)
    wide, narrow = sums
    log2_scale = scale * LOG2_E
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for _ in range(start, stop):
        first = first_token(b, wy, wx, geometry, WH, WW)
        ptr = qkv_ptr + first * (3 * C)
        statistic = (((b * grid[0] + wy) * grid[1] + wx).to(tl.int64) * num_heads + head) * N + row
        lse = tl.load(lse_ptr + statistic, mask=row < N, other=0.0)
        delta = tl.load(delta_ptr + statistic, mask=row < N, other=0.0)
        place, real, region = place_tokens(row, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
        offset, dout_offset = place[:, None] * (3 * C) + d[None, :], place[:, None] * C + d[None, :]
        q = load_tokens(ptr, offset, real, row < N, fill_ptr, d, FILL and EDGE, False)
        dout = load_tokens(dout_ptr + first * C, dout_offset, real, row < N, fill_ptr, d, False, False)
        if COLUMNS > 128:
            place, real, hidden = place_tokens(j, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
            offset = place[:, None] * (3 * C) + d[None, :]
            k = load_tokens(ptr + C, offset, real, j < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
            v = load_tokens(ptr + 2 * C, offset, real, j < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
            bias = bias_tile(bias_ptr, first_row, ROWS, 128, COLUMNS - 128, COLUMNS, FRAGMENTS)
            p = tl.exp2(tile_scores(q, k, bias, region, hidden, EDGE, PRECISION) * log2_scale - lse[:, None])
            narrow += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        place, real, hidden = place_tokens(i, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
        offset = place[:, None] * (3 * C) + d[None, :]
        k = load_tokens(ptr + C, offset, real, i < N, fill_ptr + C, d, FILL and EDGE, WHOLE)
        v = load_tokens(ptr + 2 * C, offset, real, i < N, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
        bias = bias_tile(bias_ptr, first_row, ROWS, 0, 128, COLUMNS, FRAGMENTS)
        p = tl.exp2(tile_scores(q, k, bias, region, hidden, EDGE, PRECISION) * log2_scale - lse[:, None])
        wide += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)
    return wide, narrow


@triton.jit(do_not_specialize=GEOMETRY)
def _window_attention_tall_bias_grad_kernel(
    qkv_ptr,  # (B, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), divided by scale
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    dout_ptr,  # (B, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32
    dbias_partial_ptr,  # (runs, h, ROWS*BLOCKS, COLUMNS) float32
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
    FRAGMENTS: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, run, num_runs = rest % num_heads, rest // num_heads, tl.num_programs(0) // (BLOCKS * num_heads)
    bias_ptr += head * (ROWS * BLOCKS) * COLUMNS
    ptrs = (qkv_ptr + head * D, fill_ptr + head * D, bias_ptr, dout_ptr + head * D, lse_ptr, delta_ptr)
    geometry = (B, H, W, num_heads * D, shift_h, shift_w)
    sums = (tl.zeros((ROWS, 128), tl.float32), tl.zeros((ROWS, 16), tl.float32))
    # fmt: off
    sums = _bias_gradient_windows(ptrs, block * ROWS, sums, head, num_heads, geometry, run, num_runs, scale, WH, WW, D,
                                  COLUMNS, ROWS, FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, False)
    if HAS_EDGES:
        sums = _bias_gradient_windows(ptrs, block * ROWS, sums, head, num_heads, geometry, run, num_runs, scale, WH, WW,
                                      D, COLUMNS, ROWS, FRAGMENTS, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, True)
    # fmt: on
    row, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, 128)
    partial = dbias_partial_ptr + (run * num_heads + head) * (ROWS * BLOCKS) * COLUMNS + row[:, None] * COLUMNS
    tl.store(partial + column[None, :], sums[0])
    if COLUMNS > 128:
        tl.store(partial + 128 + tl.arange(0, 16)[None, :], sums[1])


def tall_backward(
    call: WindowCall, grad_out: Tensor, lse: Tensor, needs_bias: bool, safe_dots: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqkv and the partial sums of the gradients of the N x N bias, if needed, and of what pads hold."""
    rows, columns = block_rows(call), key_columns(call)
    blocks = triton.cdiv(call.tokens, rows)
    form = BiasForm(rows * blocks, columns, call.qkv.dtype, fragments=rows == 64 and call.qkv.dtype != torch.float32)
    expanded = call.expand(form)
    warps = 4 if rows == 64 else 8
    config = call.config("window_attention_tall_bwd", call.tokens, Config(warps, 1, 8 // warps))
    runs = call.runs(config, call.num_heads)
    dqkv, delta = torch.empty_like(call.qkv), torch.empty_like(lse)
    dfill_partial = call.partial(*((runs, call.qkv.shape[-1]) if call.fills else (0,)))
    constants = (columns, rows, blocks, form.fragments, *call.rules, call.precision)
    _window_attention_tall_bwd_kernel[(call.num_heads * runs,)](
        call.qkv,
        expanded,
        call.fill,
        grad_out,
        dqkv,
        lse,
        delta,
        dfill_partial,
        *call.sizes,
        *constants,
        safe_dots,
        call.has_edges,
        **config.options,
    )
    if not needs_bias:
        return dqkv, delta, dfill_partial
    config = call.config(
        "window_attention_tall_bias_grad", call.tokens, Config(warps, 2 if rows == 64 else 1, 8 // warps)
    )
    runs = call.runs(config, call.num_heads * blocks)
    dbias_partial = call.partial(runs, call.num_heads, form.rows, columns)
    _window_attention_tall_bias_grad_kernel[(call.num_heads * blocks * runs,)](
        call.qkv,
        expanded,
        call.fill,
        grad_out,
        lse,
        delta,
        dbias_partial,
        *call.sizes,
        *constants,
        call.has_edges,
        **config.options,
    )
    return dqkv, dbias_partial, dfill_partial
