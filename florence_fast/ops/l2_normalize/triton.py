"""The ``triton`` backend of l2_normalize: the kernels, asked in the terms of the op; they keep nothing."""

import torch
from torch import Tensor

from florence_fast.kernels import l2_normalize as kernels


def l2_normalize_fwd(x: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and an empty tensor."""
    return kernels.l2_normalize_fwd(x, eps, out_dtype), x.new_empty(0, dtype=torch.float32)


def l2_normalize_bwd(grad_out: Tensor, x: Tensor, length: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return the gradient of ``x``."""
    return kernels.l2_normalize_bwd(grad_out, x, eps)
