"""The ``cpp`` backend of l2_normalize: one native kernel a direction; the length of each row (..., 1) is kept."""

import torch
from torch import Tensor

from florence_fast import native


def l2_normalize_fwd(x: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and their lengths."""
    assert out_dtype == x.dtype, f"on a CPU autocast gives norms no dtype of their own, got {out_dtype}"
    x = x.contiguous()
    out, length = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    native.call("l2_normalize_fwd", x.dtype, length.numel(), x.shape[-1], x, eps, out, length)
    return out, length


def l2_normalize_bwd(grad_out: Tensor, x: Tensor, length: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return the gradient of ``x``."""
    x = x.contiguous()
    dx = x.new_empty(x.shape)
    native.call("l2_normalize_bwd", x.dtype, length.numel(), x.shape[-1], grad_out, x, length, eps, dx)
    return dx
