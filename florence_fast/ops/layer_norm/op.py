"""LayerNorm, alone or after the residual sum and the drop path of a transformer block, in one pass.

Every block of CoSwin, Swin and the text tower has two of them (Ba et al., arXiv 1607.06450, section 3.1; drop path:
Huang et al., 1603.09382, section 3).

Letters: B samples · C channels.
"""

from typing import Any, cast

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch
from florence_fast.ops.checks import check_eps, check_tensor
from florence_fast.ops.registration import RegisteredOp, differentiable_gradients
from florence_fast.ops.spec import Op

MAX_TRITON_CHANNELS = 8192


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last axis of ``x``, or add a branch to its residual stream and normalise the sum.

    ``LN(x) = (x - mean) / sqrt(var + eps) * weight + bias`` over C (1607.06450, equation 4); with a residual
    ``s = residual + residual_scale * x`` and ``LN(s)``: what lies between two branches of a block.

    Args:
        x: (..., C), floating.
        weight: (C,), usually float32; ones by default.
        bias: (C,), usually float32; zeros by default.
        eps: added to the variance.
        residual: the shape of ``x``; under autocast it may be float32 beside a 16-bit ``x``.
        residual_scale: (B,), one factor for each sample along the first axis, constant: it gets no gradient. For drop
            path 0 or 1/keep.

    Returns:
        LN(x) (..., C) in the dtype of ``x``; with ``residual`` the pair (s, LN(s)) in the dtype to which ``residual``
        and ``x`` promote. Autocast does what it does to ``torch.nn.functional.layer_norm``: on CUDA it makes the norm
        float32 (s keeps its dtype), on a CPU it changes nothing.

    Raises:
        TypeError: an argument is no tensor, or a tensor is not floating.
        ValueError: a shape, a device or a combination of arguments is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    Statistics are float32 at least, of s as it is returned. No rows give no rows, and gradients of zero for weight and
    bias. Second derivatives are the reference's.

    >>> x, stream, factors = torch.randn(2, 49, 96), torch.randn(2, 49, 96), torch.tensor([0, 1.25])
    >>> s, norm = layer_norm(x, torch.ones(96), torch.zeros(96), residual=stream, residual_scale=factors)
    >>> torch.equal(s[0], stream[0])
    True
    """
    _check_layer_norm(x, weight, bias, eps, residual, residual_scale)
    options = {"eps": eps, "residual": residual, "residual_scale": residual_scale}
    backend = dispatch.choose("layer_norm", x, weight, bias, **options)
    if backend == "reference":
        return layer_norm_reference(x, weight, bias, **options)
    sum_dtype, norm_dtype = _result_dtypes(x, residual)
    tensors = (x, residual, residual_scale, weight, bias)
    norm, total, *_ = _layer_norm(*tensors, eps, sum_dtype, norm_dtype, backend)
    return norm if residual is None else (total, norm)


def _check_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_scale: Tensor | None,
) -> None:
    """Raise what is wrong with the arguments."""
    check_tensor("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., C) with C at least 1, got {tuple(x.shape)}")
    check_eps(eps)
    check_tensor("weight", weight, (x.shape[-1],), beside=x, optional=True)
    check_tensor("bias", bias, (x.shape[-1],), beside=x, optional=True)
    check_tensor("residual", residual, tuple(x.shape), beside=x, optional=True)
    if residual_scale is None:
        return
    if residual is None:
        raise ValueError("residual_scale is the factor of x in residual + residual_scale * x: it needs a residual")
    if x.ndim < 2:
        raise ValueError(f"residual_scale needs x of shape (B, ..., C), got {tuple(x.shape)}")
    check_tensor("residual_scale", residual_scale, (x.shape[0],), beside=x)


def _result_dtypes(x: Tensor, residual: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Give the dtypes of the sum and of its norm."""
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return sum_dtype, dispatch.float32_autocast_dtype(sum_dtype, x.device.type)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Define ``layer_norm`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    sum_dtype, norm_dtype = _result_dtypes(x, residual)
    dtype = torch.promote_types(sum_dtype, torch.float32)
    with dispatch.without_autocast(x.device.type):
        total = x
        if residual is not None:
            branch = x.to(dtype)
            if residual_scale is not None:
                branch = branch * residual_scale.detach().to(dtype).view(-1, *[1] * (x.ndim - 1))
            total = (residual.to(dtype) + branch).to(sum_dtype)
        centred = total.to(dtype) - total.to(dtype).mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        if weight is not None:
            norm = norm * weight.to(dtype)
        if bias is not None:
            norm = norm + bias.to(dtype)
        norm = norm.to(norm_dtype)
        return norm if residual is None else (total, norm)


def _triton_reasons(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> list[str]:
    return triton_row_reasons(x, weight, bias, *map(options.get, ("residual", "residual_scale")))


def _cpp_reasons(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> list[str]:
    return native.reasons(x, weight, bias, *map(options.get, ("residual", "residual_scale")))


def triton_row_reasons(x: Tensor, *others: Tensor | None) -> list[str]:
    """Say why no kernel that holds whole rows can run on these tensors."""
    reasons = dispatch.triton_reasons(x)
    if x.shape[-1] > MAX_TRITON_CHANNELS:
        reasons.append(f"the kernels hold rows of at most {MAX_TRITON_CHANNELS} elements, got {x.shape[-1]}")
    dtypes = {tensor.dtype for tensor in (x, *others) if tensor is not None}
    unknown = sorted(str(dtype) for dtype in dtypes if dtype not in dispatch.TRITON_DTYPES)
    if unknown:
        reasons.append(f"tensors must be float16, bfloat16 or float32, got {', '.join(unknown)}")
    if torch.bfloat16 in dtypes and dispatch.interpreting():
        reasons.append("Triton's interpreter cuts values off where they become bfloat16")
    return reasons


def _arguments(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *dtypes: torch.dtype,
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    return (x, weight, bias), {"eps": eps, "residual": residual, "residual_scale": residual_scale}


# The op gives the norm and, with a residual, the sum. Kept for the backward is what was normalised - x, or the sum,
# which the next block holds anyway - so that x and residual themselves need not stay. On a CPU and from the library
# mean and rstd are kept too; Triton's kernels compute them again from the row that they hold, for no bytes at all.
def _forward(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sum_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, residual, residual_scale, weight, bias)
    norm, total, mean, rstd = _OP.backend(backend).layer_norm_fwd(*tensors, eps, sum_dtype, norm_dtype)
    return norm, x.new_empty(0) if residual is None else total, mean, rstd


def _forward_fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dtype, norm_dtype, backend = args[-3:]
    rows = 0 if backend == "triton" else (*x.shape[:-1], 1)
    dtype = torch.float32 if backend == "triton" else torch.promote_types(sum_dtype, torch.float32)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=sum_dtype)
    norm = x.new_empty(x.shape, dtype=norm_dtype)
    return norm, total, x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _backward(
    grad_norm: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    eps: float,
    dsum_dtype: torch.dtype,
    dx_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_sum, needs_x, needs_weight, needs_bias = needs
    dsum, dx, dweights = _OP.backend(backend).layer_norm_bwd(
        *(grad_norm, grad_sum, total, residual_scale, weight),
        dsum_dtype if needs_sum else None,
        dx_dtype if needs_x else None,
        needs_weight or needs_bias,
        eps,
        mean,
        rstd,
    )
    grads = (
        dsum,
        dx,
        dweights[0].to(weight.dtype, copy=True) if needs_weight and weight is not None else None,
        dweights[1].to(bias.dtype, copy=True) if needs_bias and bias is not None else None,
    )
    dsum, dx, dweight, dbias = (total.new_empty(0) if grad is None else grad for grad in grads)
    return dsum, dx, dweight, dbias


def _backward_fake(
    grad_norm: Tensor, grad_sum: Tensor | None, total: Tensor, residual_scale: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, _, _, needs, _, dsum_dtype, dx_dtype, _ = args
    needs_sum, needs_x, needs_weight, needs_bias = needs
    return (
        total.new_empty(total.shape, dtype=dsum_dtype) if needs_sum else total.new_empty(0),
        total.new_empty(total.shape, dtype=dx_dtype) if needs_x else total.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else total.new_empty(0),
        bias.new_empty(bias.shape) if needs_bias else total.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, residual_scale, weight, bias, ctx.eps, *_, ctx.backend = _layer_norm.settle(inputs)
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(*((total, mean, rstd) if residual is None else (mean, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, residual_scale, weight, bias, mean, rstd)
    ctx.dtypes = (x.dtype if residual is None else residual.dtype, x.dtype)
    # Else the gradients of x and of the residual are the same numbers, and are written once.
    ctx.x_differs = residual_scale is not None or ctx.dtypes[0] != ctx.dtypes[1]


def _run_backward(ctx: Any, grad_norm: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, residual_scale, weight, bias, mean, rstd = saved = ctx.saved_tensors
    (needs_x, needs_residual), (needs_weight, needs_bias) = ctx.needs_input_grad[:2], ctx.needs_input_grad[3:5]
    nothing: tuple[None, ...] = (None,) * 4
    if grad_norm is None and grad_sum is None:
        return None, None, None, None, None, *nothing
    if torch.is_grad_enabled():
        return *_differentiable_gradients(ctx, saved, grad_norm, grad_sum), *nothing
    grad_norm = torch.zeros_like(total) if grad_norm is None else grad_norm.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    needs = [needs_residual or (needs_x and not ctx.x_differs), needs_x and ctx.x_differs, needs_weight, needs_bias]
    dsum, dx, dweight, dbias = _layer_norm_backward(
        grad_norm, grad_sum, total, residual_scale, weight, bias, mean, rstd, needs, ctx.eps, *ctx.dtypes, ctx.backend
    )
    return (
        (dx if ctx.x_differs else dsum) if needs_x else None,
        dsum if needs_residual else None,
        None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        *nothing,
    )


def _differentiable_gradients(
    ctx: Any, saved: tuple[Any, ...], grad_norm: Tensor | None, grad_sum: Tensor | None
) -> list[Tensor | None]:
    total, residual_scale, weight, bias, *_ = saved
    needs_x, needs_residual, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dsum: Any
    dsum, dweight, dbias = differentiable_gradients(
        lambda total, *parameters: [cast(Tensor, layer_norm_reference(total, *parameters, eps=ctx.eps)), total],
        (total, weight, bias),
        (needs_x or needs_residual, needs_weight, needs_bias),
        (grad_norm, grad_sum),
    )
    dx = dsum
    if needs_x and residual_scale is not None:
        dx = dsum * residual_scale.detach().to(dsum.dtype).view(-1, *[1] * (dsum.ndim - 1))
    residual_dtype, x_dtype = ctx.dtypes
    return [
        dx.to(x_dtype) if needs_x else None,
        dsum.to(residual_dtype) if needs_residual else None,
        None,
        dweight,
        dbias,
    ]


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    x, residual = torch.randn(2, 2, 5, 96, device=device)
    parameters = torch.randn(2, 96, device=device)
    return (x, *parameters), {"residual": residual, "residual_scale": torch.tensor([0.0, 1.25], device=device)}


_OP = Op(layer_norm, layer_norm_reference, example=_example, reasons={"triton": _triton_reasons, "cpp": _cpp_reasons})
_layer_norm = RegisteredOp("layer_norm", _forward, _forward_fake, _arguments)
_layer_norm_backward = RegisteredOp("layer_norm_backward", _backward, _backward_fake)
_layer_norm.register_autograd(_run_backward, setup_context=_setup_context)
_OP.forward_op, _OP.backward_op = _layer_norm, _layer_norm_backward
