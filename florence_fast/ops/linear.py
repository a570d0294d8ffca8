"""A linear layer by the fastest product at hand: what ``torch.nn.functional.linear`` computes, on a CPU often sooner.

CoSwin and the text tower call it for q, k, v and for the projections. It is no kernel of ours. It is ``F.linear``
itself off the CPU, under the backend "reference", in transforms of torch.func and in forward-mode AD. Under the backend
"torch" and in compiled code it is ``F.linear`` of operands that are widened where 16 bits are slow.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from florence_fast.ops import _product, dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias``.

    Args:
        x: (..., K), floating.
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N) in the dtype of ``x``, or in autocast's.

    Raises:
        RuntimeError: shapes or dtypes do not fit, as of ``F.linear``.

    >>> linear(torch.randn(2, 49, 96), torch.randn(288, 96), torch.zeros(288)).shape
    torch.Size([2, 49, 288])
    """
    if torch.compiler.is_compiling() or dispatch.backend_in_force() == "torch":
        return _plain(x, weight, bias)
    if dispatch.is_transformed() or not _is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    x, weight = dispatch.autocast_input(x), dispatch.autocast_input(weight)
    bias = None if bias is None else dispatch.autocast_input(bias)
    with dispatch.without_autocast("cpu"):
        needs_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        return _Linear.apply(x, weight, bias) if needs_graph else _product.linear(x, weight, bias)


def is_slow(x: Tensor) -> bool:
    """Say whether the products of ``x`` are widened: in 16 bits, its own or autocast's, without units for them."""
    return _product.widens(x, dispatch.autocast_dtype(x)) and x.is_floating_point()


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """Return the batched product ``a b + added``: (B, M, K), (B, K, N) and what broadcasts to (B, M, N).

    16-bit operands are widened where the processor has no units for them; PyTorch computes everything else.
    """
    dtype = dispatch.autocast_dtype(a)
    if not _product.widens(a, dtype):
        return a @ b if added is None else torch.baddbmm(added, a, b)
    with dispatch.without_autocast("cpu"):
        a, b = (x.to(dtype).float() for x in (a, b))
        out = a @ b if added is None else torch.baddbmm(added.to(dtype).float(), a, b)
        return out.to(dtype)


def convolution(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """Return ``convolve(x, weight, bias, *args)``, which is PyTorch's, of widened operands where 16 bits are slow."""
    dtype = dispatch.autocast_dtype(x)
    if not _product.widens(x, dtype):
        return convolve(x, weight, bias, *args)
    with dispatch.without_autocast("cpu"):
        x, weight = x.to(dtype).float(), weight.to(dtype).float()
        bias = None if bias is None else bias.to(dtype).float()
        return convolve(x, weight, bias, *args).to(dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the library's product, of widened operands where 16 bits would be slow."""
    dtype = dispatch.autocast_dtype(x)
    if not _product.widens(x, dtype):
        return F.linear(x, weight, bias)
    with dispatch.without_autocast("cpu"):
        x, weight = x.to(dtype).float(), weight.to(dtype).float()
        bias = None if bias is None else bias.to(dtype).float()
        return F.linear(x, weight, bias).to(dtype)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether this is a product of plain matrices on a CPU; the library computes, or refuses, everything else."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.is_cpu
        and (x.dtype in _product.DTYPES or _product.widens(x))
        and dispatch.backend_in_force() != "reference"
        and all(type(t) in (Tensor, Parameter) for t in tensors)
        and x.numel() > 0
        and weight.numel() > 0
        and x.ndim > 0
        and weight.shape == (len(weight), x.shape[-1])
        and (bias is None or bias.shape == weight.shape[:1])
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        with dispatch.without_autocast("cpu"):  # which is in force where backward is called inside its region
            if torch.is_grad_enabled():  # to be differentiated again
                return (
                    (grad @ weight).view(x.shape) if needs_x else None,
                    grad.T @ rows if needs_weight else None,
                    grad.sum(0) if needs_bias else None,
                )
            return (
                _product.matmul(grad, weight).view(x.shape) if needs_x else None,
                _product.matmul_over_rows(grad, rows) if needs_weight else None,
                grad.sum(0) if needs_bias else None,
            )
