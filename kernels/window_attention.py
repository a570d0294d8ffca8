"""Window attention, forward and backward, in one pass over the map: ``softmax(scale q k^T + B) v`` in every window.

A program owns one head and a run of windows. It reads q, k and v of a window where the QKV linear wrote them and
writes the result where the next linear reads it: no roll, no partition, no mask and no scores are ever in memory.
The bias, expanded to N x N and divided by the scale, stays in registers for the whole run as the accumulator that
q k^T starts from, and so does the sum of its gradient. The backward computes the probabilities anew: nothing is kept.
This is the form for N <= 64; ``window_attention_tall`` has the one for up to 144 tokens, ``window_attention_long`` the
one for windows in 3-D, for more tokens and for cosine attention.

Bytes of a window and head, at 2 bytes an element: forward 8 N d (q, k, v in, out), backward 14 N d (q, k, v, dout in;
dq, dk, dv out). Statistics are float32; results have the dtype of ``qkv``.

Compiled for sm_80 and sm_90 at N = 49 or 64 and d = 32 it must show 16-byte loads of the streams, tensor instructions
for the products, no stack in the forward and less than 64 bytes of it in the backward.

Letters: B batch · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import BiasForm, fold_bias_grad, place_bias_grad
from florence_fast.kernels.window_attention_long import long_forward
from florence_fast.kernels.window_attention_long_bwd import long_backward
from florence_fast.kernels.window_attention_tall import tall_forward
from florence_fast.kernels.window_attention_tall_bwd import tall_backward
from florence_fast.kernels.window_call import WindowCall, window_call
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

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _probabilities(q, k, bias, region, scale, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """Give softmax(scale * (q k^T + bias)) before its division (N, N), and the sums to divide by (N,)."""
    if EDGE:
        bias = hide_other_regions(region, region, bias, PRECISION if q.dtype == tl.float32 else "tf32")
    scores = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
    scale *= _LOG2_E
    p = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _forward_windows(
    qkv_ptr,
    fill_ptr,
    out_ptr,
    bias,
    geometry,
    run,
    num_runs,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    D: tl.constexpr,
    N_PAD: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Attend in this run's inner windows, or in its edge windows."""
    B, H, W, C, shift_h, shift_w = geometry
    i, d = tl.arange(0, N_PAD), tl.arange(0, D)
    valid = i < WH * WW
    WHOLE: tl.constexpr = N_PAD == WH * WW and not (EDGE and RAGGED)
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for _ in range(start, stop):
        first = first_token(b, wy, wx, geometry, WH, WW)
        place, real, region = place_tokens(i, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
        offset, ptr = place[:, None] * (3 * C) + d[None, :], qkv_ptr + first * (3 * C)
        q = load_tokens(ptr, offset, real, valid, fill_ptr, d, FILL and EDGE, WHOLE)
        k = load_tokens(ptr + C, offset, real, valid, fill_ptr + C, d, FILL and EDGE, WHOLE)
        v = load_tokens(ptr + 2 * C, offset, real, valid, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
        p, total = _probabilities(q, k, bias, region, scale, EDGE, PRECISION)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        store_tokens(out_ptr + first * C, place[:, None] * C + d[None, :], out, real, WHOLE)
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)


@triton.jit(do_not_specialize=GEOMETRY)
def _window_attention_fwd_kernel(
    qkv_ptr,  # (B, H, W, 3, h, d)
    bias_ptr,  # (h, N_PAD, N_PAD), divided by scale
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    out_ptr,  # (B, H, W, h, d)
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
    N_PAD: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    head, run, num_runs = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    i = tl.arange(0, N_PAD)
    bias = tl.load(bias_ptr + head * N_PAD * N_PAD + i[:, None] * N_PAD + i[None, :])
    qkv_ptr, fill_ptr, out_ptr = qkv_ptr + head * D, fill_ptr + head * D, out_ptr + head * D
    geometry = (B, H, W, num_heads * D, shift_h, shift_w)
    # fmt: off
    _forward_windows(qkv_ptr, fill_ptr, out_ptr, bias, geometry, run, num_runs, scale,
                     WH, WW, D, N_PAD, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, False)
    if HAS_EDGES:
        _forward_windows(qkv_ptr, fill_ptr, out_ptr, bias, geometry, run, num_runs, scale,
                         WH, WW, D, N_PAD, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, True)
    # fmt: on


@triton.jit
def _window_gradients(q, k, v, dout, p, total, PRECISION: tl.constexpr, SAFE_DOTS: tl.constexpr):
    """Give the gradients of q k^T + B (N, N), and of q, k and v (N, d), the first two not yet scaled."""
    p *= (1.0 / total)[:, None]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    p_low, ds_low = p.to(v.dtype), ds.to(v.dtype)
    if SAFE_DOTS:
        # Some Triton versions give wrong values on Hopper for a product whose left side is a transposed product.
        dv = tl.trans(tl.dot(tl.trans(dout), p_low, input_precision=PRECISION))
        dk = tl.trans(tl.dot(tl.trans(q), ds_low, input_precision=PRECISION))
    else:
        dv = tl.dot(tl.trans(p_low), dout, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds_low), q, input_precision=PRECISION)
    # In this order the compiler needs the fewest registers.
    dq = tl.dot(ds_low, k, input_precision=PRECISION)
    return ds, dq, dk, dv


@triton.jit
def _backward_windows(
    qkv_ptr,
    fill_ptr,
    dout_ptr,
    dqkv_ptr,
    bias,
    dbias,
    geometry,
    run,
    num_runs,
    scale,
    WH: tl.constexpr,
    WW: tl.constexpr,
    D: tl.constexpr,
    N_PAD: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAFE_DOTS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Differentiate this run's inner or edge windows; give ``dbias`` with their part, and the pads' dq, dk, dv (d,)."""
    B, H, W, C, shift_h, shift_w = geometry
    i, d = tl.arange(0, N_PAD), tl.arange(0, D)
    valid = i < WH * WW
    WHOLE: tl.constexpr = N_PAD == WH * WW and not (EDGE and RAGGED)
    dfill_k, dfill_v = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for _ in range(start, stop):
        first = first_token(b, wy, wx, geometry, WH, WW)
        place, real, region = place_tokens(i, wy, wx, geometry, WH, WW, CYCLIC_H, CYCLIC_W, not FILL, RAGGED, EDGE)
        offset, ptr = place[:, None] * (3 * C) + d[None, :], qkv_ptr + first * (3 * C)
        q = load_tokens(ptr, offset, real, valid, fill_ptr, d, FILL and EDGE, WHOLE)
        k = load_tokens(ptr + C, offset, real, valid, fill_ptr + C, d, FILL and EDGE, WHOLE)
        v = load_tokens(ptr + 2 * C, offset, real, valid, fill_ptr + 2 * C, d, FILL and EDGE, WHOLE)
        dout_offset = place[:, None] * C + d[None, :]
        dout = load_tokens(dout_ptr + first * C, dout_offset, real, valid, fill_ptr, d, False, WHOLE)
        p, total = _probabilities(q, k, bias, region, scale, EDGE, PRECISION)
        ds, dq, dk, dv = _window_gradients(q, k, v, dout, p, total, PRECISION, SAFE_DOTS)
        dbias += ds
        dq, dk = dq * scale, dk * scale
        ptr = dqkv_ptr + first * (3 * C)
        store_tokens(ptr, offset, dq, real, WHOLE)
        store_tokens(ptr + C, offset, dk, real, WHOLE)
        store_tokens(ptr + 2 * C, offset, dv, real, WHOLE)
        if FILL and EDGE:
            # A pad is nobody's query that counts: its dq is zero.
            dfill_k += tl.sum(tl.where(real[:, None], 0.0, dk), 0)
            dfill_v += tl.sum(tl.where(real[:, None], 0.0, dv), 0)
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)
    return dbias, dfill_k, dfill_v


@triton.jit(do_not_specialize=GEOMETRY)
def _window_attention_bwd_kernel(
    qkv_ptr,  # (B, H, W, 3, h, d)
    bias_ptr,  # (h, N_PAD, N_PAD), divided by scale
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    dout_ptr,  # (B, H, W, h, d)
    dqkv_ptr,  # (B, H, W, 3, h, d)
    dbias_partial_ptr,  # (runs, h, N_PAD, N_PAD) float32
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
    N_PAD: tl.constexpr,
    CYCLIC_H: tl.constexpr,
    CYCLIC_W: tl.constexpr,
    FILL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    SAFE_DOTS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    head, run, num_runs = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    i, d = tl.arange(0, N_PAD), tl.arange(0, D)
    square = i[:, None] * N_PAD + i[None, :]
    bias = tl.load(bias_ptr + head * N_PAD * N_PAD + square)
    dbias = tl.zeros((N_PAD, N_PAD), tl.float32)
    qkv_ptr, fill_ptr, dout_ptr, dqkv_ptr = (
        qkv_ptr + head * D,
        fill_ptr + head * D,
        dout_ptr + head * D,
        dqkv_ptr + head * D,
    )
    geometry = (B, H, W, num_heads * D, shift_h, shift_w)
    # fmt: off
    dbias, _, _ = _backward_windows(
        qkv_ptr, fill_ptr, dout_ptr, dqkv_ptr, bias, dbias, geometry, run, num_runs, scale,
        WH, WW, D, N_PAD, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, SAFE_DOTS, False)
    if HAS_EDGES:
        dbias, dfill_k, dfill_v = _backward_windows(
            qkv_ptr, fill_ptr, dout_ptr, dqkv_ptr, bias, dbias, geometry, run, num_runs, scale,
            WH, WW, D, N_PAD, CYCLIC_H, CYCLIC_W, FILL, RAGGED, PRECISION, SAFE_DOTS, True)
        if FILL:
            C = num_heads * D
            partial = dfill_partial_ptr + run * 3 * C + head * D + d
            tl.store(partial, tl.zeros((D,), tl.float32))
            tl.store(partial + C, dfill_k)
            tl.store(partial + 2 * C, dfill_v)
    # fmt: on
    tl.store(dbias_partial_ptr + (run * num_heads + head) * N_PAD * N_PAD + square, dbias)


def _form(call: WindowCall) -> BiasForm:
    side = max(16, triton.next_power_of_2(call.tokens))
    return BiasForm(side, side, torch.float32)


def _config(call: WindowCall, kernel: str, backward: bool) -> Config:
    """Return the measured configuration, else one whose code the static budget has found free of long spills."""
    default = Config(num_warps=4, num_stages=2, programs_per_sm=2 if backward else 4)
    if call.qkv.dtype == torch.float32 and call.precision == "ieee":
        default = Config(num_warps=8, num_stages=1 if backward else 2, programs_per_sm=1)
    elif call.head_dim == 128 and backward:
        default = Config(num_warps=8, num_stages=1, programs_per_sm=1)
    return call.config(kernel, _form(call).rows, default)


def window_attention_fwd(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    scale: float,
    pad_mode: str,
    cyclic: Sequence[bool],
    train: bool,
    tf32: bool = False,
    logit_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result and what the backward needs beside the inputs.

    That is nothing for a window of up to 64 tokens in 2-D without cosines, else the log-sum-exp of each row, in base
    2, (B*M, h, N).
    """
    arguments = (window_size, num_heads, shift_size, scale, pad_mode, cyclic, tf32, logit_scale)
    call = window_call(qkv, rel_pos_bias_table, bias, qkv_bias, *arguments)
    out = call.qkv.new_empty(*qkv.shape[:-1], num_heads * call.head_dim)
    # What was asked for decides, and not the map: a compiled function holds for every map.
    keeps = train and (call.full[0] > 1 or logit_scale is not None or math.prod(call.full) > 64)
    kept = call.partial(*((call.windows, num_heads, call.tokens) if keeps else (0,)))
    if out.numel() == 0:
        return out, kept
    if call.is_long or call.tokens > 64:
        (long_forward if call.is_long else tall_forward)(call, out, kept if keeps else None)
        return out, kept
    form, config = _form(call), _config(call, "window_attention_fwd", backward=False)
    _window_attention_fwd_kernel[(num_heads * call.runs(config, num_heads),)](
        call.qkv,
        call.expand(form),
        call.fill,
        out,
        *call.sizes,
        form.rows,
        *call.rules,
        call.precision,
        call.has_edges,
        **config.options,
    )
    return out, kept


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    qkv_bias: Tensor | None,
    kept: Tensor,
    needs: Sequence[bool],
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    scale: float,
    pad_mode: str,
    cyclic: Sequence[bool],
    tf32: bool = False,
    safe_dots: bool = False,
    logit_scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, table, bias, qkv_bias and logit_scale, None where ``needs`` is false.

    ``safe_dots`` avoids products whose left side is a transposed product.
    """
    needs_qkv, needs_table, needs_bias, needs_qkv_bias, *needs_logit_scale = needs
    arguments = (window_size, num_heads, shift_size, scale, pad_mode, cyclic, tf32, logit_scale)
    call = window_call(qkv, rel_pos_bias_table, bias, qkv_bias, *arguments)
    dlogit_scale = None
    if call.is_long:
        dqkv, dbias_partial, dfill_partial, dlogit_scale = long_backward(call, grad_out, kept, needs)
    else:
        backward = tall_backward if call.tokens > 64 else _backward
        dqkv, dbias_partial, dfill_partial = backward(call, grad_out, kept, needs_table or needs_bias, safe_dots)
    dqkv_bias = None
    if needs_qkv_bias:
        dqkv_bias = dfill_partial.sum(0).to(qkv_bias.dtype) if call.fills else torch.zeros_like(qkv_bias)
    return (
        dqkv if needs_qkv else None,
        fold_bias_grad(dbias_partial, rel_pos_bias_table, call.full, call.window) if needs_table else None,
        place_bias_grad(dbias_partial, bias, call.full, call.window) if needs_bias else None,
        dqkv_bias,
        dlogit_scale if any(needs_logit_scale) else None,
    )


def _backward(
    call: WindowCall, grad_out: Tensor, kept: Tensor, needs_bias: bool, safe_dots: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqkv and the partial sums of the gradients of the N x N bias and of what pads hold."""
    form, config = _form(call), _config(call, "window_attention_bwd", backward=True)
    runs = call.runs(config, call.num_heads)
    dqkv = torch.empty_like(call.qkv)
    dbias_partial = call.partial(runs, call.num_heads, form.rows, form.columns)
    dfill_partial = call.partial(*((runs, call.qkv.shape[-1]) if call.fills else (0,)))
    _window_attention_bwd_kernel[(call.num_heads * runs,)](
        call.qkv,
        call.expand(form),
        call.fill,
        grad_out,
        dqkv,
        dbias_partial,
        dfill_partial,
        *call.sizes,
        form.rows,
        *call.rules,
        call.precision,
        safe_dots,
        call.has_edges,
        **config.options,
    )
    return dqkv, dbias_partial, dfill_partial
