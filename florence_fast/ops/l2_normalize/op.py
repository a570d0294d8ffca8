"""Features brought to length 1, as both towers' are before they are compared.

Florence's contrastive loss takes cosines of them (arXiv 2111.11432, section 2.2).

Letters: D embedding dim.
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch
from florence_fast.ops.checks import check_eps, check_tensor
from florence_fast.ops.layer_norm.op import triton_row_reasons
from florence_fast.ops.spec import Op


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
    backend = dispatch.choose("l2_normalize", x, eps=eps)
    if backend == "reference":
        return l2_normalize_reference(x, eps=eps)
    return _l2_normalize(x, eps, dispatch.float32_autocast_dtype(x.dtype, x.device.type), backend)[0]


def _check_l2_normalize(x: Tensor, eps: float) -> None:
    """Raise what is wrong with the arguments."""
    check_tensor("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., D) with D at least 1, got {tuple(x.shape)}")
    check_eps(eps)


def l2_normalize_reference(x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Define ``l2_normalize`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    out_dtype = dispatch.float32_autocast_dtype(x.dtype, x.device.type)
    with dispatch.without_autocast(x.device.type):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)).to(out_dtype)


# Kept for the backward is x and, on a CPU and from the library, the lengths; Triton's kernels compute them again from
# the row that they hold, for no bytes at all.
def _outputs(x: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    triton = backend == "triton"
    dtype = torch.float32 if triton else torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(0 if triton else (*x.shape[:-1], 1), dtype=dtype)


def _example(device: str) -> tuple[tuple[Tensor], dict[str, Any]]:
    return (torch.randn(4, 48, device=device),), {}


_l2_normalize = Op(
    l2_normalize,
    l2_normalize_reference,
    example=_example,
    reasons={"triton": lambda x, **_: triton_row_reasons(x), "cpp": lambda x, **_: native.reasons(x)},
    tensors=1,
    outputs=_outputs,
)
