"""The feed-forward branch of a transformer block: two products of the library's with a fused activation between them.

Every block of CoSwin, Swin and the text tower ends with one (GELU: Hendrycks and Gimpel, arXiv 1606.08415, section 2).

Letters: C channels in · F hidden width · E channels out · R rows.
"""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from florence_fast import native
from florence_fast.errors import unknown
from florence_fast.ops import _backend, _op
from florence_fast.ops._product import chunks, linear, matmul, matmul_over_rows, widened, widens
from florence_fast.ops.mlp import cpp
from florence_fast.ops.mlp import torch as torch_backend

Sizes = tuple[int, ...]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Apply linear, activation, linear.

    ``act(x weight1^T + bias1) weight2^T + bias2``, the activation being GELU, ``z P(N(0, 1) <= z)`` (1606.08415,
    section 2), or one of the two approximations of it given there.

    Args:
        x: (..., C), floating.
        weight1: (F, C), as of ``nn.Linear``.
        bias1: (F,) or None.
        weight2: (E, F).
        bias2: (E,) or None.
        activation: "gelu", "gelu_tanh" or "quick_gelu", ``z sigmoid(1.702 z)``.

    Returns:
        (..., E) in the dtype of ``x``; under autocast in autocast's, unless they are float64.

    Raises:
        TypeError: an argument is no tensor, or a tensor is not floating.
        ValueError: a shape, a dtype, a device or a name is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    For the backward x and the wide tensor before the activation are kept, R F numbers; the activation, as many again
    in the usual form, is computed anew. No rows give no rows. Second derivatives are the reference's.

    >>> x, weight1, weight2 = torch.randn(2, 49, 96), torch.randn(384, 96), torch.randn(96, 384)
    >>> mlp(x, weight1, torch.zeros(384), weight2, torch.zeros(96)).shape
    torch.Size([2, 49, 96])
    """
    _check_mlp(x, weight1, bias1, weight2, bias2, activation)
    tensors = (x, weight1, bias1, weight2, bias2)
    backend = _backend.choose("mlp", *tensors, activation=activation)
    tensors = tuple(None if t is None else _backend.autocast_input(t) for t in tensors)
    if backend == "reference":
        return mlp_reference(*tensors, activation=activation)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _mlp(*tensors, activation, train, backend)[0]


def _check_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> None:
    """Raise what is wrong with the arguments."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    for name, tensor in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if x.ndim == 0:
        raise ValueError("x must have shape (..., C), got ()")
    if weight1.ndim != 2 or weight1.shape[1] != x.shape[-1] or 0 in weight1.shape:
        raise ValueError(f"weight1 must have shape (F, {x.shape[-1]}), got {tuple(weight1.shape)}")
    if weight2.ndim != 2 or weight2.shape[1] != weight1.shape[0] or 0 in weight2.shape:
        raise ValueError(f"weight2 must have shape (E, {weight1.shape[0]}), got {tuple(weight2.shape)}")
    _check_operand("weight1", weight1, None, x)
    _check_operand("bias1", bias1, weight1.shape[0], x)
    _check_operand("weight2", weight2, None, x)
    _check_operand("bias2", bias2, weight2.shape[0], x)


def _check_operand(name: str, tensor: Tensor | None, width: int | None, x: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if width is not None and tuple(tensor.shape) != (width,):
        raise ValueError(f"{name} must have shape ({width},), got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype:
        wanted, got = _backend.autocast_dtype(x), _backend.autocast_dtype(tensor)
        if wanted != got:
            raise ValueError(f"{name} must have the dtype of x, {wanted}, got {got}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def mlp_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Define ``mlp`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with _backend.without_autocast(x.device.type):
        wide = (None if t is None else t.to(dtype) for t in (x, weight1, bias1, weight2, bias2))
        y, weight1, bias1, weight2, bias2 = wide
        z = F.linear(y, weight1, bias1)
        if activation == "quick_gelu":
            z = z * torch.sigmoid(1.702 * z)
        else:
            z = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
        return F.linear(z, weight2, bias2).to(x.dtype)


def unsupported_reasons(backend: str, x: Tensor, *tensors: Tensor | None, **_: Any) -> list[str]:
    """Say why ``backend`` cannot run ``mlp`` on these arguments; an empty list means that it can."""
    if backend == "triton":
        return _triton_reasons(x)
    if backend == "cpp":
        return native.reasons(x)
    return []


def _triton_reasons(x: Tensor) -> list[str]:
    reasons = _backend.triton_reasons(x)
    dtype = _backend.autocast_dtype(x)
    if dtype not in _backend.TRITON_DTYPES:
        reasons.append(f"x must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and _backend.interpreting():
        reasons.append("Triton's interpreter cuts values off where they become bfloat16")
    return reasons


def _arguments(*inputs: Any) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    return inputs[:5], {"activation": inputs[5]}


# Kept for the backward is the first product (R, F), once: without its bias for the kernel, which adds that itself, with
# it for the library. The activation is written again, beside its gradient, when the second product's gradient needs it.
def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    train: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if widens(x):
        return _forward_widened(x, weight1, bias1, weight2, bias2, activation=activation, train=train, backend=backend)
    if backend == "cpp" and not train:
        return cpp.mlp_fwd(x, weight1, bias1, weight2, bias2, activation), x.new_empty(0)
    in_kernel = backend != "torch"
    hidden = linear(x.reshape(-1, x.shape[-1]), weight1, None if in_kernel else bias1)
    out = _implementation(backend).bias_activation_fwd(hidden, bias1 if in_kernel else None, activation, not train)
    out = linear(out, weight2, bias2).view(*x.shape[:-1], weight2.shape[0])
    return out, hidden if train else x.new_empty(0)


def _forward_widened(
    x: Tensor, *weights_and_biases: Tensor | None, activation: str, train: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Run `_forward` in float32, some rows at a time, and round what it gives."""
    wide, rows = widened(*weights_and_biases), x.reshape(-1, x.shape[-1])
    weight1, _, weight2, _ = wide
    out = x.new_empty(len(rows), len(weight2))
    kept = x.new_empty(len(rows) if train else 0, len(weight1))
    for part in chunks(len(rows), len(weight1)):
        out[part], hidden = _forward(rows[part].float(), *wide, activation, train, backend)
        if train:
            kept[part] = hidden
    return out.view(*x.shape[:-1], len(weight2)), kept if train else x.new_empty(0)


def _forward_fake(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    train = args[2]
    hidden = x.new_empty((math.prod(x.shape[:-1]), weight1.shape[0]) if train else 0)
    return x.new_empty(*x.shape[:-1], weight2.shape[0]), hidden


def _backward(
    grad_out: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden: Tensor,
    needs: list[bool],
    activation: str,
    train: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if widens(x):
        tensors = (grad_out, x, weight1, bias1, weight2, bias2, hidden)
        return _backward_widened(*tensors, needs=needs, activation=activation, train=train, backend=backend)
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = needs
    implementation, inner_bias = _implementation(backend), None if backend == "torch" else bias1
    g, rows = grad_out.view(-1, weight2.shape[0]), x.reshape(-1, x.shape[-1])
    if backend == "cpp" and any(needs[:4]):
        dx, d_weight1, d_bias1, d_weight2 = cpp.mlp_bwd(g, rows, weight1, bias1, weight2, hidden, needs[:4], activation)
        grads = (
            dx.view(x.shape) if needs_x else None,
            d_weight1,
            d_bias1.to(bias1.dtype) if needs_bias1 else None,
            d_weight2,
            g.sum(0) if needs_bias2 else None,
        )
        return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
    d_hidden = d_bias1 = activated = None
    if needs_x or needs_weight1 or needs_bias1:
        d_hidden, activated, d_bias1 = implementation.bias_activation_bwd(
            matmul(g, weight2), hidden, inner_bias, activation, needs_weight2, needs_bias1
        )
    elif needs_weight2:
        activated = implementation.bias_activation_fwd(hidden, inner_bias, activation, False)
    grads = (
        matmul(d_hidden, weight1).view(x.shape) if needs_x else None,
        matmul_over_rows(d_hidden, rows) if needs_weight1 else None,
        d_bias1.to(bias1.dtype) if needs_bias1 else None,
        matmul_over_rows(g, activated) if needs_weight2 else None,
        g.sum(0) if needs_bias2 else None,
    )
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _backward_widened(
    grad_out: Tensor, x: Tensor, *tensors: Tensor | None, needs: list[bool], activation: str, train: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `_backward` in float32, some rows at a time, add up and round."""
    *weights_and_biases, hidden = tensors
    wide, g, rows = widened(*weights_and_biases), grad_out.view(-1, grad_out.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = x.new_empty(rows.shape if needs[0] else 0)
    totals: list[Tensor] = []
    for part in chunks(len(rows), hidden.shape[1], long=True):
        d_part, *terms = _backward(
            g[part].float(), rows[part].float(), *wide, hidden[part].float(), needs, activation, train, backend
        )
        if needs[0]:
            dx[part] = d_part
        totals = [total.add_(term) for total, term in zip(totals, terms, strict=True)] if totals else terms
    return dx.view(x.shape) if needs[0] else dx, *(total.to(x.dtype) for total in totals)


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, needs = args[:5], args[6]
    return tuple(
        x.new_empty(x.shape) if need else grad_out.new_empty(0) for x, need in zip(tensors, needs, strict=True)
    )


def _flops(x: Sizes, weight1: Sizes, bias1: Any, weight2: Sizes, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the two products, as torch.utils.flop_counter counts those of ``nn.Linear``."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight1) + math.prod(weight2))


def _flops_backward(grad_out: Sizes, *args: Any, **kwargs: Any) -> int:
    """Each product of the forward has two in the backward; what needs no gradient counts all the same."""
    return 2 * _flops(*args, **kwargs)


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    shapes = ((2, 5, 16), (64, 16), (64,), (16, 64), (16,))
    return tuple(torch.randn(shape, device=device) for shape in shapes), {}


def _implementation(backend: str) -> ModuleType:
    """Return the module of a backend; that of the kernels needs triton, so it is imported where it is used."""
    if backend == "triton":
        from florence_fast.kernels import bias_activation as kernels

        return kernels
    if backend == "cpp":
        return cpp
    return torch_backend


_mlp = _op.define("mlp", 5, _forward, _forward_fake, _backward, _backward_fake, _arguments)
register_flop_formula(torch.ops.florence_fast.mlp)(_flops)
register_flop_formula(torch.ops.florence_fast.mlp_backward)(_flops_backward)
_backend.register_entry(_backend.OpEntry("mlp", mlp, mlp_reference, unsupported_reasons, _example))
