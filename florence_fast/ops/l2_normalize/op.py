"""Features brought to length 1, as both towers' are before they are compared.

Florence's contrastive loss takes cosines of them (arXiv 2111.11432, section 2.2).

Letters: D embedding dim.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import _backend, _op
from florence_fast.ops.l2_normalize import cpp
from florence_fast.ops.l2_normalize import torch as torch_backend
from florence_fast.ops.layer_norm.op import triton_row_reasons


def l2_normalize(x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Divide each row along the last axis by its Euclidean length.

    ``x / max(|x|, eps)``, as ``torch.nn.functional.normalize(x, dim=-1)``; lengths are float32 at least, so that
    16-bit features are as good as float32 ones rounded.

    Args:
        x: (..., D), floating.
        eps: the least divisor: a shorter row is divided by it, and a row of zeros stays zeros.

    Returns:
        (..., D) in the dtype of ``x``. Autocast does what it does to ``torch.nn.functional.normalize``: on CUDA it
        makes 16-bit features float32, on a CPU it changes nothing.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: ``x`` has no axis or nothing along the last one, or ``eps`` is negative.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    The gradient of a row shorter than eps is dout / eps. Second derivatives are the reference's.

    >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    _check_l2_normalize(x, eps)
    backend = _backend.choose("l2_normalize", x, eps=eps)
    if backend == "reference":
        return l2_normalize_reference(x, eps=eps)
    return _l2_normalize(x, eps, _backend.float32_autocast_dtype(x.dtype, x.device.type), backend)[0]


def _check_l2_normalize(x: Tensor, eps: float) -> None:
    """Raise what is wrong with the arguments."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., D) with D at least 1, got {tuple(x.shape)}")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {eps!r}")


def l2_normalize_reference(x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Define ``l2_normalize`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    out_dtype = _backend.float32_autocast_dtype(x.dtype, x.device.type)
    with _backend.without_autocast(x.device.type):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)).to(out_dtype)


def unsupported_reasons(backend: str, x: Tensor, **_: Any) -> list[str]:
    """Say why ``backend`` cannot run ``l2_normalize`` on these arguments; an empty list means that it can."""
    if backend == "triton":
        return triton_row_reasons(x)
    if backend == "cpp":
        return native.reasons(x)
    return []


def _arguments(x: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, Any]]:
    return (x,), {"eps": eps}


# Kept for the backward is x and, on a CPU and from the library, the lengths; Triton's kernels compute them again from
# the row that they hold, for no bytes at all.
def _forward(x: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    out, *lengths = _implementation(backend).l2_normalize_fwd(x, eps, out_dtype)
    return out, *(lengths or [x.new_empty(0, dtype=torch.float32)])


def _forward_fake(x: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    triton = backend == "triton"
    dtype = torch.float32 if triton else torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(0 if triton else (*x.shape[:-1], 1), dtype=dtype)


def _backward(
    grad_out: Tensor,
    x: Tensor,
    length: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kept = () if backend == "triton" else (length,)
    return _implementation(backend).l2_normalize_bwd(grad_out, x, eps, *kept)


def _backward_fake(grad_out: Tensor, x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.values = _l2_normalize.settle(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])


# Not joined by _op.define: its backward gives a tuple, and one of a single tensor makes compiled sizes constants.
def _run_backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    if grad_out is None:
        return None, None, None, None
    x, length = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = _op.differentiable_gradients(
            lambda x: [l2_normalize_reference(x, eps=ctx.values[0])], [x], [True], [grad_out]
        )
        return *gradients, None, None, None
    return _l2_normalize_backward(grad_out.contiguous(), x, length, *ctx.values), None, None, None


def _example(device: str) -> tuple[tuple[Tensor], dict[str, Any]]:
    return (torch.randn(4, 48, device=device),), {}


def _implementation(backend: str) -> ModuleType:
    """Return the module of a backend; that of the kernels needs triton, so it is imported where it is used."""
    if backend == "triton":
        from florence_fast.kernels import l2_normalize as kernels

        return kernels
    return cpp if backend == "cpp" else torch_backend


_l2_normalize, _l2_normalize_backward = _op.define_pair(
    "l2_normalize", _forward, _forward_fake, _backward, _backward_fake, _arguments
)
_l2_normalize.register_autograd(_run_backward, setup_context=_setup_context)
_backend.register_entry(
    _backend.OpEntry("l2_normalize", l2_normalize, l2_normalize_reference, unsupported_reasons, _example)
)
