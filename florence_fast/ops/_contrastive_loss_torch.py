"""The statistics of the contrastive loss by library calls: one tile of logits at a time, in a scratch of fixed size.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a tile of logits
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DEFAULT_CHUNK_SIZE = 1024


def contrastive_loss_fwd(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    weight: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five statistics of ``contrastive_statistics``, in its order."""
    rows, cols, scale = accumulation_dtype(rows, cols, scale)
    row_top, row_sum = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows))
    col_top, col_sum = cols.new_full((len(cols),), -torch.inf), cols.new_zeros(len(cols))
    positive = rows.new_zeros(len(rows))
    for r, c in tiles(len(rows), len(cols), chunk_size):
        logits = (rows[r] @ cols[c].T).mul_(scale)
        positive[r] += torch.where(row_labels[r, None] == col_labels[c], logits, 0).sum(1)
        _add_exp_(row_top[r], row_sum[r], logits, 1)
        _add_exp_(col_top[c], col_sum[c], logits, 0)
    return row_top, row_sum.log_(), col_top, col_sum.log_(), positive * weight


def _add_exp_(top: Tensor, total: Tensor, logits: Tensor, axis: int) -> None:
    """Add the exponentials of ``logits`` along an axis to sums that are kept as total * exp(top)."""
    greater = torch.maximum(top, logits.amax(axis))
    total.mul_((top - greater).exp_()).add_((logits - greater.unsqueeze(axis)).exp_().sum(axis))
    top.copy_(greater)


def contrastive_loss_bwd(
    drow_lse: Tensor,
    dcol_lse: Tensor,
    dpositive: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    weight: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    needs: list[bool],
    chunk_size: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false.

    Positives enter G before the products, so that a probability near 1 cancels against its target in one number and
    not in D sums.
    """
    dpositive = dpositive * weight

    def write_grad(logits: Tensor, r: slice, c: slice) -> Tensor:
        grad = (logits - row_lse[r, None]).exp_().mul_(drow_lse[r, None])
        grad += logits.sub_(col_lse[c]).exp_().mul_(dcol_lse[c])
        return grad.add_(torch.where(row_labels[r, None] == col_labels[c], dpositive[r, None], 0))

    return chunked_gradients(rows, cols, scale, needs, chunk_size, write_grad)


def chunked_gradients(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    needs: list[bool],
    chunk_size: int,
    write_grad: Callable[[Tensor, slice, slice], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows, cols and scale, None where ``needs`` is false.

    Each tile of scale * rows cols^T is computed again and becomes G = ``write_grad(logits, row slice, column slice)``,
    whose two products are added up.
    """
    dtypes = rows.dtype, cols.dtype, scale.dtype
    rows, cols, scale = accumulation_dtype(rows, cols, scale)
    # <rows, G cols> is d scale, so the scale needs the first product too.
    needs_rows, needs_cols = needs[0] or needs[2], needs[1]
    drows, dcols = rows.new_zeros(rows.shape), cols.new_zeros(cols.shape)
    for r, c in tiles(len(rows), len(cols), chunk_size):
        grad = write_grad((rows[r] @ cols[c].T).mul_(scale), r, c)
        if needs_rows:
            drows[r].addmm_(grad, cols[c])
        if needs_cols:
            dcols[c].addmm_(grad.T, rows[r])
    dscale = (rows * drows).sum().to(dtypes[2]) if needs[2] else None
    return (
        drows.mul_(scale).to(dtypes[0]) if needs[0] else None,
        dcols.mul_(scale).to(dtypes[1]) if needs_cols else None,
        dscale,
    )


def accumulation_dtype(*tensors: Tensor) -> list[Tensor]:
    """Half precision is multiplied and summed in float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype) for x in tensors]


def tiles(num_rows: int, num_cols: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut the logits into tiles of ``size`` a side, the last ones smaller; 0 lets this backend choose."""
    size = size or DEFAULT_CHUNK_SIZE
    for row in range(0, num_rows, size):
        for col in range(0, num_cols, size):
            yield slice(row, row + size), slice(col, col + size)
