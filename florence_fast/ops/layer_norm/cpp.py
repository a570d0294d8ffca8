"""The ``cpp`` backend of layer_norm: one native kernel a direction, which reads and writes every element once.

Beside the results the forward gives mean and rstd of every row, float32, for the backward.

Letters: B samples · C channels.
"""

import torch
from torch import Tensor

from florence_fast import native


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
    assert norm_dtype == sum_dtype, f"on a CPU autocast gives norms no dtype of their own, got {norm_dtype}"
    x = x.contiguous()
    norm = torch.empty_like(x, dtype=norm_dtype)
    total = x if residual is None else torch.empty_like(norm)
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    residual = None if residual is None else residual.contiguous()
    native.call(
        "layer_norm_fwd",
        *(x.dtype, x.dtype if residual is None else residual.dtype, *_sizes(x)),
        *(x, residual, _float(residual_scale), _float(weight), _float(bias), eps, total, norm, mean, rstd),
    )
    return norm, total, mean, rstd


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
    total = total.contiguous()
    dsum, dx = (None if t is None else torch.empty_like(total, dtype=t) for t in (dsum_dtype, dx_dtype))
    d_weights = total.new_empty(2, total.shape[-1], dtype=torch.float32) if needs_weight else None
    # One that is not asked for is taken to have the dtype of the sum, which promotes with any to the same.
    dtypes = (total.dtype if t is None else t for t in (dx_dtype, dsum_dtype))
    native.call(
        "layer_norm_bwd",
        *(*dtypes, *_sizes(total), grad_norm, grad_sum, total, *(_float(t) for t in (residual_scale, weight))),
        *(mean, rstd, dsum, dx, d_weights),
    )
    return dsum, dx, d_weights


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Give the number of rows, their length, and how many of them one factor of the branch holds for."""
    rows = x.numel() // x.shape[-1]
    return rows, x.shape[-1], rows // max(len(x), 1)


def _float(tensor: Tensor | None) -> Tensor | None:
    """Give a row of parameters or factors as the kernels read it."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()
