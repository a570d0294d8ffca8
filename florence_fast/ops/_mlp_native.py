"""The ``cpp`` backend of mlp: the native activation, between products of the faster library.

Where nothing is kept for a backward, rows pass through all three steps some at a time: the wide tensor of a chunk stays
in the caches, and the whole one, which is four times as long as the input, never exists.
"""

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops._product import linear, linear_into

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
"""Their places are the numbers in csrc/kernels.h."""

CHUNK_BYTES = 4 << 20
"""How many bytes of the wide tensor exist at a time."""


def mlp_fwd(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    """Return the result (..., E), keeping nothing."""
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, CHUNK_BYTES // (weight1.shape[0] * x.element_size()))
    if rows.shape[0] <= step:
        out = linear(_hidden(rows, weight1, bias1, activation), weight2, bias2)
    else:
        out = x.new_empty(rows.shape[0], weight2.shape[0])
        for part, place in zip(rows.split(step), out.split(step), strict=True):
            linear_into(place, _hidden(part, weight1, bias1, activation), weight2, bias2)
    return out.view(*x.shape[:-1], weight2.shape[0])


def _hidden(rows: Tensor, weight1: Tensor, bias1: Tensor | None, activation: str) -> Tensor:
    return bias_activation_fwd(linear(rows, weight1), bias1, activation, True)


def bias_activation_fwd(hidden: Tensor, bias: Tensor | None, activation: str, in_place: bool) -> Tensor:
    """Return the activation of ``hidden + bias``, (R, F), in the memory of ``hidden`` if that may go."""
    hidden = hidden.contiguous()
    out = hidden if in_place else torch.empty_like(hidden)
    kind, bias = ACTIVATIONS.index(activation), None if bias is None else bias.contiguous()
    native.call("bias_activation_fwd", hidden.dtype, kind, *hidden.shape, hidden, bias, out)
    return out


def bias_activation_bwd(
    grad_out: Tensor, hidden: Tensor, bias: Tensor | None, activation: str, needs_out: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of ``hidden``, the activation and the gradient of the bias, None unless asked for."""
    d_hidden = torch.empty_like(hidden)
    out = torch.empty_like(hidden) if needs_out else None
    d_bias = hidden.new_zeros(hidden.shape[1], dtype=torch.float32) if needs_bias else None
    tensors = (grad_out.contiguous(), hidden, None if bias is None else bias.contiguous(), d_hidden, out, d_bias)
    kind = ACTIVATIONS.index(activation)
    native.call("bias_activation_bwd", hidden.dtype, kind, *hidden.shape, *tensors)
    return d_hidden, out, d_bias
