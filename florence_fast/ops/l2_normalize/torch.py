"""The ``torch`` backend of l2_normalize: library calls only, forward and backward, on any device.

The length of each row (..., 1), in float32 at least, is kept for the backward.
"""

import torch
from torch import Tensor


def l2_normalize_fwd(x: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and their lengths."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x / length.clamp_min(eps)).to(out_dtype).contiguous(), length


def l2_normalize_bwd(grad_out: Tensor, x: Tensor, length: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return the gradient of ``x``."""
    factor = 1 / length.clamp_min(eps)
    out = x * factor
    # A row shorter than eps is divided by a constant.
    along = torch.where(length < eps, 0, (grad_out * out).sum(-1, keepdim=True))
    return torch.addcmul(grad_out, out, along, value=-1).mul(factor).to(x.dtype).contiguous()
