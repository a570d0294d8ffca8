"""The ``torch`` backend of patch merging: library calls only, forward and backward, on any device.

Images are merged a few at a time, so that the 4C tensor of a slice stays near the caches of a CPU and the whole one is
never written. Everything is summed in an order that does not depend on threads.

Letters: B batch · H W map height and width · C channels · M merged tokens of the whole batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._product import widened, widens

SLICE_BYTES = 4 << 20
"""How many bytes of the 4C tensor a CPU works on at a time."""
SCRATCH_BYTES = 64 << 20
"""The same elsewhere."""


def gather(x: Tensor) -> Tensor:
    """Put four neighbours side by side in Swin's order: (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 4C)."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, dy, W/2, dx, C)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


def scatter(merged: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo ``gather``; what the pads got is dropped."""
    x = merged.unflatten(3, (2, 2, -1))  # (B, H/2, W/2, dx, dy, C)
    x = x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]


def patch_merging_fwd(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the merged map (B, ceil(H/2), ceil(W/2), 2C)."""
    weight = weight.to(x.dtype)
    if widens(x):
        wide_x, norm_weight, norm_bias, weight = widened(x, norm_weight, norm_bias, weight)
        return patch_merging_fwd(wide_x, norm_weight, norm_bias, weight, eps).to(x.dtype)
    norm_weight, norm_bias = (p.to(_wide(x)) for p in (norm_weight, norm_bias))
    out = x.new_empty(len(x), (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, len(weight))
    for images in _slices(x):
        norm, *_ = torch.native_layer_norm(_rows(x[images]), norm_weight.shape, norm_weight, norm_bias, eps)
        torch.mm(norm.flatten(0, 2).to(x.dtype), weight.T, out=out[images].flatten(0, 2))
    return out


def patch_merging_bwd(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    needs: list[bool],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, norm_weight, norm_bias and weight, None where ``needs`` is false.

    Rows are gathered and normalised again: on a CPU that takes 0.3 of the time of a product at C = 96, 0.06 at 384.
    """
    if widens(x):
        parameters = (norm_weight, norm_bias, weight)
        g, wide_x, gain, shift, wide_weight = widened(grad_out, x, norm_weight, norm_bias, weight.to(x.dtype))
        grads = patch_merging_bwd(g, wide_x, gain, shift, wide_weight, needs, eps)
        return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, (x, *parameters), strict=True))
    *needs_norm, needs_weight = needs
    wide, parameters = _wide(x), (norm_weight.to(_wide(x)), norm_bias.to(_wide(x)))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_norm[0] else None
    totals: list[Any] = [None, None, None]
    for images in _slices(x):
        grad, rows = grad_out[images], _rows(x[images])
        norm, mean, rstd = torch.native_layer_norm(rows, norm_weight.shape, *parameters, eps)
        terms: list[Tensor | None] = [None, None, None]
        if any(needs_norm):
            dnorm = (grad @ weight.to(x.dtype)).to(rows.dtype)
            drows, *terms[:2] = torch.ops.aten.native_layer_norm_backward(
                dnorm, rows, norm_weight.shape, mean, rstd, *parameters, needs_norm
            )
            if dx is not None:
                dx[images] = scatter(drows, (x.shape[1], x.shape[2]))
        if needs_weight:
            terms[2] = _product(grad.flatten(0, 2).T, norm.flatten(0, 2).to(x.dtype))
        totals = [_add(total, term, wide) for total, term in zip(totals, terms, strict=True)]
    grads = zip(totals, (norm_weight, norm_bias, weight), needs[1:], strict=True)
    return dx, *(total.to(parameter.dtype) if need else None for total, parameter, need in grads)


def _slices(x: Tensor) -> Iterator[slice]:
    """Walk over the batch, as many images at a time as their 4C tensor may have bytes."""
    budget = SLICE_BYTES if x.device.type == "cpu" else SCRATCH_BYTES
    image = x.element_size() * x.shape[1] * x.shape[2] * x.shape[3]
    step = max(1, budget // image)
    for start in range(0, max(len(x), 1), step):
        yield slice(start, start + step)


def _wide(x: Tensor) -> torch.dtype:
    """Give the dtype of sums, and of the norm's weights: the library keeps its statistics in theirs."""
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """Gather, in a dtype that the library normalises by float32 weights: on a CPU that of ``x``."""
    rows = gather(x)
    return rows if x.device.type == "cpu" else rows.to(_wide(x))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, summed in float32 at least, and so returned where that is possible without a copy."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float64 else a @ b


def _add(total: Tensor | None, term: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Add a slice's term to the total of those before, in float32 at least once there are two."""
    return term if total is None or term is None else total.to(dtype).add_(term)
