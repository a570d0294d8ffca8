"""The feed-forward branch of a transformer block: two products of the library's with a fused activation between them.

Every block of CoSwin, Swin and the text tower ends with one (GELU: Hendrycks and Gimpel, arXiv 1606.08415, section 2).

Letters: C channels in · F hidden width · E channels out · R rows.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast import native
from florence_fast.errors import unknown
from florence_fast.ops import dispatch
from florence_fast.ops._product import chunks, linear, matmul, matmul_over_rows, widened, widens
from florence_fast.ops.checks import check_tensor
from florence_fast.ops.spec import Op

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
    backend = dispatch.choose("mlp", *tensors, activation=activation)
    tensors: tuple[Any, ...] = tuple(None if t is None else dispatch.autocast_input(t) for t in tensors)
    if backend == "reference":
        return mlp_reference(*tensors, activation=activation)
    return _mlp(*tensors, activation, backend)[0]


def _check_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> None:
    """Raise what is wrong with the arguments."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    for name, tensor in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        check_tensor(name, tensor)
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
    check_tensor(name, tensor, *(() if width is None else ((width,),)))
    if tensor.dtype != x.dtype:
        wanted, got = dispatch.autocast_dtype(x), dispatch.autocast_dtype(tensor)
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
    with dispatch.without_autocast(x.device.type):
        y, weight1, weight2 = x.to(dtype), weight1.to(dtype), weight2.to(dtype)
        bias1, bias2 = (None if t is None else t.to(dtype) for t in (bias1, bias2))
        z = F.linear(y, weight1, bias1)
        if activation == "quick_gelu":
            z = z * torch.sigmoid(1.702 * z)
        else:
            z = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
        return F.linear(z, weight2, bias2).to(x.dtype)


def _triton_reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = dispatch.triton_reasons(x)
    dtype = dispatch.autocast_dtype(x)
    if dtype not in dispatch.TRITON_DTYPES:
        reasons.append(f"x must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter cuts values off where they become bfloat16")
    return reasons


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
    implementation = _mlp.backend(backend)
    if backend == "cpp":
        return implementation.mlp_fwd(x, weight1, bias1, weight2, bias2, activation, train)
    in_kernel = backend != "torch"
    hidden = linear(x.reshape(-1, x.shape[-1]), weight1, None if in_kernel else bias1)
    out = implementation.bias_activation_fwd(hidden, bias1 if in_kernel else None, activation, not train)
    out = linear(out, weight2, bias2).view(*x.shape[:-1], weight2.shape[0])
    return out, hidden if train else x.new_empty(0)


def _forward_widened(
    x: Tensor, *weights_and_biases: Tensor | None, activation: str, train: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Run `_forward` in float32, some rows at a time, and round what it gives."""
    weight1, bias1, weight2, bias2 = widened(*weights_and_biases)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight2))
    kept = x.new_empty(len(rows) if train else 0, len(weight1))
    for part in chunks(len(rows), len(weight1)):
        out[part], hidden = _forward(rows[part].float(), weight1, bias1, weight2, bias2, activation, train, backend)
        if train:
            kept[part] = hidden
    return out.view(*x.shape[:-1], len(weight2)), kept if train else x.new_empty(0)


def _outputs(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
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
    backend: str,
) -> tuple[Tensor | None, ...]:
    if widens(x):
        tensors = (grad_out, x, weight1, bias1, weight2, bias2, hidden)
        return _backward_widened(*tensors, needs=needs, activation=activation, backend=backend)
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = needs
    implementation, inner_bias = _mlp.backend(backend), None if backend == "torch" else bias1
    g, rows = grad_out.view(-1, weight2.shape[0]), x.reshape(-1, x.shape[-1])
    if backend == "cpp" and any(needs[:4]):
        dx, d_weight1, d_bias1, d_weight2 = implementation.mlp_bwd(
            g, rows, weight1, bias1, weight2, hidden, needs[:4], activation
        )
        return (
            dx.view(x.shape) if needs_x else None,
            d_weight1,
            d_bias1.to(bias1.dtype) if needs_bias1 and bias1 is not None else None,
            d_weight2,
            g.sum(0) if needs_bias2 else None,
        )
    d_hidden: Any = None
    d_bias1: Any = None
    activated: Any = None
    if needs_x or needs_weight1 or needs_bias1:
        d_hidden, activated, d_bias1 = implementation.bias_activation_bwd(
            matmul(g, weight2), hidden, inner_bias, activation, needs_weight2, needs_bias1
        )
    elif needs_weight2:
        activated = implementation.bias_activation_fwd(hidden, inner_bias, activation, False)
    return (
        matmul(d_hidden, weight1).view(x.shape) if needs_x else None,
        matmul_over_rows(d_hidden, rows) if needs_weight1 else None,
        d_bias1.to(bias1.dtype) if needs_bias1 and bias1 is not None else None,
        matmul_over_rows(g, activated) if needs_weight2 else None,
        g.sum(0) if needs_bias2 else None,
    )


def _backward_widened(
    grad_out: Tensor, x: Tensor, *tensors: Any, needs: list[bool], activation: str, backend: str
) -> tuple[Tensor | None, ...]:
    """Run `_backward` in float32, some rows at a time, add up and round."""
    *weights_and_biases, hidden = tensors
    weight1, bias1, weight2, bias2 = widened(*weights_and_biases)
    g, rows = grad_out.view(-1, grad_out.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = x.new_empty(rows.shape) if needs[0] else None
    totals: list[Tensor | None] = []
    for part in chunks(len(rows), hidden.shape[1], long=True):
        d_part, *terms = _backward(
            g[part].float(),
            rows[part].float(),
            weight1,
            bias1,
            weight2,
            bias2,
            hidden[part].float(),
            needs,
            activation,
            backend,
        )
        if dx is not None and d_part is not None:
            dx[part] = d_part
        totals = [_sum(*pair) for pair in zip(totals, terms, strict=True)] if totals else terms
    return None if dx is None else dx.view(x.shape), *(None if total is None else total.to(x.dtype) for total in totals)


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return None if total is None or term is None else total.add_(term)


def _flops(x: Sizes, weight1: Sizes, bias1: Any, weight2: Sizes, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the two products, as torch.utils.flop_counter counts those of ``nn.Linear``."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight1) + math.prod(weight2))


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    shapes = ((2, 5, 16), (64, 16), (64,), (16, 64), (16,))
    return tuple(torch.randn(shape, device=device) for shape in shapes), {}


_mlp = Op(
    mlp,
    mlp_reference,
    example=_example,
    reasons={"triton": _triton_reasons, "cpp": lambda x, *_, **__: native.reasons(x)},
    tensors=5,
    outputs=_outputs,
    forward=_forward,
    backward=_backward,
    flops=_flops,
)
