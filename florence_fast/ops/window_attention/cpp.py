"""The ``cpp`` backend of window attention: the native kernels, asked in the terms of the op.

Nothing is kept for the backward: in a cache the probabilities cost less to compute again than to read.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops.windows import MAX_LOG_SCALE, Size, cut_map


def window_attention_fwd(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """Return the result and an empty tensor; ``values`` are window_size to cyclic, then train."""
    window_size, num_heads, shift_size, scale, pad_mode, cyclic, _ = values
    geometry = _geometry(qkv.shape, tuple(window_size), num_heads, tuple(shift_size), pad_mode, tuple(cyclic))
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    if out.numel():
        tensors = _extras(rel_pos_bias_table, bias, logit_scale, qkv_bias)
        native.call("window_attention_fwd", qkv.dtype, geometry, scale, qkv.contiguous(), _addresses(tensors), out)
    return out, qkv.new_empty(0)


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    kept: Tensor,
    needs: list[bool],
    *values: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, table, bias, logit_scale and qkv_bias, None where ``needs`` is false."""
    window_size, num_heads, shift_size, scale, pad_mode, cyclic = values
    geometry = _geometry(qkv.shape, tuple(window_size), num_heads, tuple(shift_size), pad_mode, tuple(cyclic))
    tensors = _extras(rel_pos_bias_table, bias, logit_scale, qkv_bias)
    d_qkv = qkv.new_empty(qkv.shape) if needs[0] else None
    grads = [
        torch.zeros_like(x) if need and x is not None else None for x, need in zip(tensors, needs[1:], strict=True)
    ]
    if qkv.numel():
        addresses, into = _addresses(tensors), _addresses(grads)
        native.call(
            "window_attention_bwd", qkv.dtype, geometry, scale, grad_out, qkv.contiguous(), addresses, d_qkv, into
        )
    d_table, d_bias, d_log, d_qkv_bias = grads
    if d_log is not None and logit_scale is not None:
        # The clamp passes the gradient at its border, as torch.clamp does.
        d_log = torch.where(logit_scale.flatten() <= MAX_LOG_SCALE, d_log, 0).view_as(logit_scale)
    grads = (d_table, d_bias, d_log, d_qkv_bias)
    originals: tuple[Any, ...] = (rel_pos_bias_table, bias, logit_scale, qkv_bias)
    return d_qkv, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, originals, strict=True))


@functools.lru_cache(maxsize=256)
def _geometry(
    shape: tuple[int, ...], window_size: Size, num_heads: int, shift_size: Size, pad_mode: str, cyclic: tuple[bool, ...]
) -> list[int]:
    """Give the members of WindowGeometry of csrc/kernels.h in their order."""
    cut = cut_map(shape[1:-1], window_size, shift_size)
    flat = 3 - len(cut.size)
    per_axis = ((cut.size, 1), (cut.window, 1), (window_size, 1), (cut.shift, 0), (cyclic, 0))
    sizes = [int(x) for values, missing in per_axis for x in (*[missing] * flat, *values)]
    head_dim = shape[-1] // (3 * num_heads)
    return [shape[0], *sizes, num_heads, head_dim, int(pad_mode == "mask")]


def _extras(
    table: Tensor | None, bias: Tensor | None, logit_scale: Tensor | None, qkv_bias: Tensor | None
) -> list[Tensor | None]:
    """Give what is added to the scores in float32, the factor of the cosines in place of its logarithm."""
    if logit_scale is not None:
        logit_scale = logit_scale.flatten().float().clamp(max=MAX_LOG_SCALE).exp()
    # Loops, because a comprehension costs a call.
    extras: list[Tensor | None] = []
    for x in (table, bias, logit_scale, qkv_bias):
        extras.append(None if x is None else x.float().contiguous())
    return extras


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    addresses = []
    for x in tensors:
        addresses.append(0 if x is None else x.data_ptr())
    return addresses
