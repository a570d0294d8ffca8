"""The ``torch`` backend of layer_norm: library calls only, forward and backward, on any device.

The library keeps its statistics in the dtype of the weights, so that reduced precision gets float32 weights on a CPU,
which it takes beside them; elsewhere weights of another dtype are met in float32.

Letters: B samples · C channels.
"""

import torch
from torch import Tensor

REDUCED = (torch.float16, torch.bfloat16)


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sum_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the norm, the sum (``x`` without a residual), and the mean and rstd (..., 1)."""
    total = x
    if residual is not None:
        total = residual + x if residual_scale is None else _add_scaled(residual, x, residual_scale)
        total = total.to(sum_dtype).contiguous()
    y, weight, bias = _operands(total, weight, bias, norm_dtype)
    norm, mean, rstd = torch.native_layer_norm(y, x.shape[-1:], weight, bias, eps)
    return norm.to(norm_dtype).contiguous(), total, mean, rstd


def layer_norm_bwd(
    grad_norm: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    dsum_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    needs_weight: bool,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the sum, of x (that of the sum times the factors), and of weight and bias (2, C).

    Each is None unless its dtype is given or ``needs_weight`` is true.
    """
    needs = [dsum_dtype is not None or dx_dtype is not None, needs_weight, needs_weight]
    y, weight, _ = _operands(total, weight, None, grad_norm.dtype)
    if needs_weight and weight is None:
        weight = y.new_ones(y.shape[-1:])
    bias = weight  # the library asks for one, and reads its dtype alone
    d, *d_weights = torch.ops.aten.native_layer_norm_backward(
        grad_norm.to(y.dtype), y.contiguous(), total.shape[-1:], mean, rstd, weight, bias, needs
    )
    if grad_sum is not None and needs[0]:
        d = d.add_(grad_sum) if d.dtype == grad_sum.dtype else d + grad_sum
    dsum = None if dsum_dtype is None else d.to(dsum_dtype)
    dx = None if dx_dtype is None else d if residual_scale is None else _scale(d, residual_scale)
    return dsum, None if dx is None else dx.to(dx_dtype), torch.stack(d_weights) if needs_weight else None


# A factor such as 1/0.9 is not rounded to the dtype of x. On a CPU a float32 tensor beside 16-bit ones would make
# float32 copies of those, so there it is a number for each sample.
def _add_scaled(residual: Tensor, x: Tensor, residual_scale: Tensor) -> Tensor:
    if not (x.device.type == "cpu" and x.dtype in REDUCED and residual.dtype == x.dtype):
        return torch.addcmul(residual, x, _by_sample(residual_scale, x))
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    wide = torch.empty(x.shape[1:], dtype=torch.float32)
    for out, stream, branch, factor in zip(total, residual, x, residual_scale.tolist(), strict=True):
        out.copy_(wide.copy_(branch).mul_(factor).add_(stream))
    return total


def _scale(d: Tensor, residual_scale: Tensor) -> Tensor:
    if not (d.device.type == "cpu" and d.dtype in REDUCED):
        return d * _by_sample(residual_scale, d)
    dx = torch.empty_like(d, memory_format=torch.contiguous_format)
    for out, part, factor in zip(dx, d, residual_scale.tolist(), strict=True):
        torch.mul(part, factor, out=out)
    return dx


def _by_sample(residual_scale: Tensor, x: Tensor) -> Tensor:
    """Give the factors, at least float32, in a shape that meets x (B, ...)."""
    scale = residual_scale.to(torch.promote_types(residual_scale.dtype, torch.float32))
    return scale.view(-1, *[1] * (x.ndim - 1))


def _operands(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give what is normalised, weight and bias in dtypes that the library takes together."""
    wide = torch.promote_types(total.dtype, torch.float32)
    if total.device.type == "cpu" and total.dtype in REDUCED and norm_dtype == total.dtype:
        weight = torch.ones(total.shape[-1], device=total.device) if weight is None else weight.float()
        return total, weight, None if bias is None else bias.float()
    if any(dtype != total.dtype for dtype in (norm_dtype, *(p.dtype for p in (weight, bias) if p is not None))):
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        total = total.to(wide)
    return total, weight, bias
