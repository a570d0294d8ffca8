"""The ``cpp`` backend of patch merging: one native kernel gathers and normalises neighbours, the products are torch's.

Tokens are merged a few at a time, so that their 4C rows stay in the caches between kernel and product, and the whole
4C tensor is never written. The backward's kernel scatters the gradient of the rows straight back to the map. Chunks
depend on sizes alone, and what they add up to is added in order.

Letters: B batch · H W map height and width · C channels · M merged tokens of the whole batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops._product import linear_into, matmul_into, matmul_over_rows, widens

CHUNK_BYTES = 4 << 20
"""How many bytes of the 4C tensor are worked on at a time."""
BACKWARD_CHUNK_BYTES = 16 << 20
"""The same in the backward, where every chunk adds to the whole gradient of the weight."""


def patch_merging_fwd(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the merged map (B, ceil(H/2), ceil(W/2), 2C)."""
    x, weight, norm_weight, norm_bias = _operands(x, weight, norm_weight, norm_bias)
    out = x.new_empty(_merged_shape(x))
    rows = _Rows(x, CHUNK_BYTES)
    for start, stop in rows.chunks():
        norm = rows.normalise(x, start, stop, norm_weight, norm_bias, eps)
        linear_into(out.view(-1, len(weight))[start:stop], norm, weight)
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

    Rows are gathered and normalised again, which costs little beside the products.
    """
    dtypes = [parameter.dtype for parameter in (norm_weight, norm_bias, weight)]
    needs_x, needs_norm, needs_weight = needs[0], needs[1] or needs[2], needs[3]
    x, weight, norm_weight, norm_bias = _operands(x, weight, norm_weight, norm_bias)
    dx = x.new_empty(x.shape) if needs_x else None
    d_norm: Any = None
    d_weight: Any = None
    grad_MC, rows = grad_out.view(-1, len(weight)), _Rows(x, BACKWARD_CHUNK_BYTES)
    for start, stop in rows.chunks():
        grad, norm = grad_MC[start:stop], rows.normalise(x, start, stop, norm_weight, norm_bias, eps)
        if needs_weight:
            d_weight = _add(d_weight, matmul_over_rows(grad, norm))
        if needs_x or needs_norm:
            # The norm is not needed any more: its gradient takes its memory, which the caches hold.
            matmul_into(norm, grad, weight)
            part = x.new_empty(2, len(norm_weight), dtype=torch.float32) if needs_norm else None
            rows.backward(norm, x, start, stop, norm_weight, dx, part)
            d_norm = _add(d_norm, part)
    grads = zip((*(d_norm if needs_norm else (None, None)), d_weight), dtypes, needs[1:], strict=True)
    return dx, *(total.to(dtype, copy=True) if need and total is not None else None for total, dtype, need in grads)


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """Add a chunk's term to the total of those before, in float32 once there are two."""
    return term if total is None or term is None else total.float().add_(term)


class _Rows:
    """The normalised 4C rows of a map, of which a chunk exists at a time."""

    def __init__(self, x: Tensor, chunk_bytes: int) -> None:
        _, self.height, self.width, self.channels = x.shape
        self.count = _merged_shape(x)[:3].numel()
        self.step = max(1, chunk_bytes // (4 * self.channels * x.element_size()))
        longest = min(self.step, self.count)
        self.norm = x.new_empty(longest, 4 * self.channels)
        self.mean, self.rstd = x.new_empty(2, longest, dtype=torch.float32)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Walk over the rows."""
        for start in range(0, max(self.count, 1), self.step):  # one without rows gives gradients of zero
            yield start, min(start + self.step, self.count)

    def normalise(self, x: Tensor, start: int, stop: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return a chunk; it is overwritten by the next."""
        norm = self.norm[: stop - start]
        native.call(
            "patch_merging_norm_fwd",
            *(x.dtype, start, stop - start, self.height, self.width, self.channels),
            *(x, weight, bias, eps, norm, self.mean, self.rstd),
        )
        return norm

    def backward(
        self, grad: Tensor, x: Tensor, start: int, stop: int, weight: Tensor, dx: Tensor | None, d_norm: Tensor | None
    ) -> None:
        """From the gradient of the chunk normalised last, write its part of ``dx`` and the sums ``d_norm`` (2, 4C)."""
        native.call(
            "patch_merging_norm_bwd",
            *(x.dtype, start, stop - start, self.height, self.width, self.channels),
            *(grad, x, weight, self.mean, self.rstd, dx, d_norm),
        )


def _merged_shape(x: Tensor) -> torch.Size:
    batch, height, width, channels = x.shape
    return torch.Size((batch, (height + 1) // 2, (width + 1) // 2, 2 * channels))


def _operands(x: Tensor, weight: Tensor, *norm_parameters: Tensor) -> tuple[Tensor, ...]:
    """Give the map and the product's weight in the dtype of the map, the norm's parameters as the kernels read them."""
    weight = weight.to(x.dtype)
    weight = weight.float() if widens(x) else weight  # once, and not for every chunk
    return x.contiguous(), weight, *(p.detach().float().contiguous() for p in norm_parameters)
