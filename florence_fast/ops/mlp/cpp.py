"""The ``cpp`` backend of mlp: the native activation, between products of the faster library.

Where nothing is kept for a backward, rows pass through all three steps some at a time: the wide tensor of a chunk stays
in the caches, and the whole one, which is four times as long as the input, never exists. With a backward the first
product is kept whole. The activation, and in the backward the gradient of the wide tensor, exist for a chunk only, in
memory that all chunks share: results of tens of megabytes would be mapped anew each time, and the first touch of a page
costs more than the arithmetic on it.
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops._product import linear, linear_into, matmul_into, matmul_over_rows

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
"""Their places are the numbers in csrc/kernels.h."""

CHUNK_BYTES = 4 << 20
"""How many bytes of the wide tensor exist at a time, unless the weights are long."""
BACKWARD_CHUNK_BYTES = 8 << 20
"""The same in the backward, where each chunk adds to the whole gradients of the weights."""
CHUNK_OVER_WEIGHT = 4
"""A chunk is at least so many times as long as a weight, which every chunk reads and packs anew."""


def mlp_fwd(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    train: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result (..., E) and what is kept: the first product (R, F) without its bias, nothing without train."""
    rows = x.reshape(-1, x.shape[-1])
    kept = linear(rows, weight1) if train else x.new_empty(0)
    step = _rows_of_chunk(len(rows), weight1, weight2, CHUNK_BYTES)
    if len(rows) <= step:
        hidden = bias_activation_fwd(kept if train else linear(rows, weight1), bias1, activation, not train)
        return linear(hidden, weight2, bias2).view(*x.shape[:-1], weight2.shape[0]), kept
    out = x.new_empty(len(rows), weight2.shape[0])
    shared = kept.new_empty(step, weight1.shape[0]) if train else None
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        if shared is None:
            hidden = activated = linear(rows[here], weight1)
        else:
            hidden = kept[here]
            activated = shared[: len(hidden)]
        _activation(hidden, bias1, activation, activated)
        linear_into(out[here], activated, weight2, bias2)
    return out.view(*x.shape[:-1], weight2.shape[0]), kept


def _rows_of_chunk(rows: int, weight1: Tensor, weight2: Tensor, chunk_bytes: int) -> int:
    """Divide the rows evenly, by sizes alone: a few rows left over would cost a whole reading of the weights."""
    longest = max(weight1.numel(), weight2.numel()) * weight1.element_size()
    row = weight1.shape[0] * weight1.element_size()
    chunks = max(1, round(rows * row / max(chunk_bytes, CHUNK_OVER_WEIGHT * longest)))
    return max(1, -(-rows // chunks))


def mlp_bwd(
    grad: Tensor,
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    needs: list[bool],
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of rows (R, C), weight1, bias1 (float32) and weight2, None where ``needs`` is false.

    ``grad`` (R, E) is the gradient of the result, ``hidden`` (R, F) the first product without its bias. At least one
    of the four is needed.
    """
    needs_x, needs_weight1, needs_bias1, needs_weight2 = needs
    step = _rows_of_chunk(len(rows), weight1, weight2, BACKWARD_CHUNK_BYTES)
    inner = needs_x or needs_weight1 or needs_bias1
    d_wide, activated = (hidden.new_empty(min(step, len(hidden)), hidden.shape[1]) for _ in range(2))
    dx: Any = rows.new_empty(rows.shape) if needs_x else None
    out: Any
    d_weight1 = d_bias1 = d_weight2 = None
    for start in range(0, max(len(hidden), 1), step):  # one without rows gives gradients of zero
        here = slice(start, start + step)
        g, h, x = grad[here], hidden[here], rows[here]
        d, out = d_wide[: len(h)], activated[: len(h)] if needs_weight2 else None
        if inner:
            matmul_into(d, g, weight2)
            d_bias = hidden.new_zeros(hidden.shape[1], dtype=torch.float32) if needs_bias1 else None
            _activation_bwd(d, h, bias1, activation, d, out, d_bias)
            d_bias1 = _add(d_bias1, d_bias)
        else:
            _activation(h, bias1, activation, out)
        if needs_x:
            matmul_into(dx[here], d, weight1)
        if needs_weight1:
            d_weight1 = _add(d_weight1, matmul_over_rows(d, x))
        if needs_weight2:
            d_weight2 = _add(d_weight2, matmul_over_rows(g, out))
    return dx, _as(d_weight1, weight1), d_bias1, _as(d_weight2, weight2)


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """Add a chunk's term to the total of those before, in float32 once there are two."""
    return term if total is None or term is None else total.float().add_(term)


def _as(total: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if total is None else total.to(weight.dtype)


def bias_activation_fwd(hidden: Tensor, bias: Tensor | None, activation: str, in_place: bool) -> Tensor:
    """Return the activation of ``hidden + bias``, (R, F), in the memory of ``hidden`` if that may go."""
    hidden = hidden.contiguous()
    out = hidden if in_place else torch.empty_like(hidden)
    _activation(hidden, bias, activation, out)
    return out


def bias_activation_bwd(
    grad_out: Tensor, hidden: Tensor, bias: Tensor | None, activation: str, needs_out: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of ``hidden``, the activation and the gradient of the bias, None unless asked for."""
    d_hidden = torch.empty_like(hidden)
    out = torch.empty_like(hidden) if needs_out else None
    d_bias = hidden.new_zeros(hidden.shape[1], dtype=torch.float32) if needs_bias else None
    _activation_bwd(grad_out.contiguous(), hidden, bias, activation, d_hidden, out, d_bias)
    return d_hidden, out, d_bias


def _activation(hidden: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Write the activation of ``hidden + bias`` to ``out``, which may be ``hidden``."""
    kind, bias = ACTIVATIONS.index(activation), None if bias is None else bias.contiguous()
    native.call("bias_activation_fwd", hidden.dtype, kind, *hidden.shape, hidden, bias, out)


def _activation_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    activation: str,
    d_hidden: Tensor,
    out: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Write the gradient of ``hidden`` to ``d_hidden``, which may be ``grad_out``, and what else is given."""
    kind, bias = ACTIVATIONS.index(activation), None if bias is None else bias.contiguous()
    native.call("bias_activation_bwd", hidden.dtype, kind, *hidden.shape, grad_out, hidden, bias, d_hidden, out, d_bias)
