"""The ``triton`` backend of layer_norm: the kernels, asked in the terms of the op.

They compute mean and rstd again from the row that they hold, so that an empty tensor stands for each.
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast.kernels import layer_norm as kernels


def layer_norm_fwd(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the norm, the sum (``x`` without a residual), and two empty tensors."""
    norm, total = kernels.layer_norm_fwd(x, *arguments)
    return norm, total, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def layer_norm_bwd(grad_norm: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the sum, of x, and of weight and bias; the last two arguments are mean and rstd."""
    return kernels.layer_norm_bwd(grad_norm, *arguments[:-2])
