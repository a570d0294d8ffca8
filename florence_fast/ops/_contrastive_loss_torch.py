"""The statistics of the contrastive loss by library calls: one tile of logits at a time, in a scratch of fixed size.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a tile of logits
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DEFAULT_CHUNK_SIZE = 1024


def contrastive_loss_fwd(
    rows: Tensor, cols: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp of every row (R,) and of every column (N,), and every row's mean positive logit (R,)."""
    rows, cols, scale = _accumulation_dtype(rows, cols, scale)
    row_lse = rows.new_full((len(rows),), -torch.inf)
    col_lse = rows.new_full((len(cols),), -torch.inf)
    positive = rows.new_zeros(len(rows))
    for r, c in _tiles(len(rows), len(cols), chunk_size):
        logits = (rows[r] @ cols[c].T).mul_(scale)
        row_lse[r] = torch.logaddexp(row_lse[r], logits.logsumexp(1))
        col_lse[c] = torch.logaddexp(col_lse[c], logits.logsumexp(0))
        positive[r] += logits.masked_fill_(row_labels[r, None] != col_labels[c], 0).sum(1)
    return row_lse, col_lse, positive * _positive_weight(row_labels, col_labels, rows.dtype)


def contrastive_loss_bwd(
    drow_lse: Tensor,
    dcol_lse: Tensor,
    dpositive: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    needs: list[bool],
    chunk_size: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false.

    Each tile is computed again and becomes G, whose two products are added up; positives enter G before the products,
    so that a probability near 1 cancels against its target in one number and not in D sums.
    """
    dtypes = rows.dtype, cols.dtype, scale.dtype
    rows, cols, scale = _accumulation_dtype(rows, cols, scale)
    # <rows, G cols> is d scale, so the scale needs the first product too.
    needs_rows, needs_cols = needs[0] or needs[2], needs[1]
    drows, dcols = rows.new_zeros(rows.shape), cols.new_zeros(cols.shape)
    target = dpositive * _positive_weight(row_labels, col_labels, rows.dtype)
    for r, c in _tiles(len(rows), len(cols), chunk_size):
        logits = (rows[r] @ cols[c].T).mul_(scale)
        grad = (logits - row_lse[r, None]).exp_().mul_(drow_lse[r, None])
        grad += logits.sub_(col_lse[c]).exp_().mul_(dcol_lse[c])
        grad += torch.where(row_labels[r, None] == col_labels[c], target[r, None], 0)
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


def _accumulation_dtype(*tensors: Tensor) -> list[Tensor]:
    """Half precision is multiplied and summed in float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype) for x in tensors]


def _tiles(num_rows: int, num_cols: int, size: int) -> Iterator[tuple[slice, slice]]:
    size = size or DEFAULT_CHUNK_SIZE
    for row in range(0, num_rows, size):
        for col in range(0, num_cols, size):
            yield slice(row, row + size), slice(col, col + size)


def _positive_weight(row_labels: Tensor, col_labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/|P(i)| for every row, counted in the sorted labels without comparing all pairs."""
    ordered = col_labels.sort().values
    count = torch.searchsorted(ordered, row_labels, right=True) - torch.searchsorted(ordered, row_labels)
    return count.to(dtype).reciprocal()
