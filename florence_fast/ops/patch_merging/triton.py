"""The ``triton`` backend of patch merging: the kernels, asked in the terms of the op."""

from typing import Any

from torch import Tensor

from florence_fast.kernels import patch_merging as kernels
from florence_fast.ops import dispatch


def patch_merging_fwd(x: Tensor, *arguments: Any) -> Tensor:
    """Return the merged map; ``arguments`` are norm_weight, norm_bias, weight and eps."""
    norm_weight, norm_bias, weight, eps = arguments
    return kernels.patch_merging_fwd(x, norm_weight, norm_bias, weight, eps, dispatch.allows_tf32(x))


def patch_merging_bwd(grad_out: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors, None where needs is false; ``arguments`` as before, needs before eps."""
    norm_weight, norm_bias, weight, needs, eps = arguments
    return kernels.patch_merging_bwd(grad_out, x, norm_weight, norm_bias, weight, needs, eps, dispatch.allows_tf32(x))
