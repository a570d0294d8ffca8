"""The ``triton`` backend of the contrastive loss: kernels for what has R x N elements, the library for products.

Rows and columns are sorted by label first, so that positives lie near the diagonal.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import math

import torch
from torch import Tensor

from florence_fast.kernels import contrastive_loss as kernels
from florence_fast.kernels.targets import target_of
from florence_fast.ops import _backend

SCRATCH_BYTES = 128 << 20
LN_2 = math.log(2)


def contrastive_loss_fwd(
    rows: Tensor, cols: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp of every row (R,) and of every column (N,), and every row's mean positive logit (R,)."""
    rows, cols = rows.contiguous(), cols.contiguous()
    row_lse, col_lse = kernels.contrastive_loss_fwd(
        rows, cols, scale.float(), SCRATCH_BYTES, _backend.allows_tf32(rows)
    )
    return row_lse * LN_2, col_lse * LN_2, scale.float() * _mean_positive(rows, cols, row_labels, col_labels)


def _mean_positive(rows: Tensor, cols: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """Return <u_i, mean of its positives>: a product with the mean needs no R x N elements."""
    groups = _Groups(row_labels, col_labels)
    sums = torch.segment_reduce(cols[groups.col_order].float(), "sum", lengths=groups.lengths, unsafe=True)
    return (rows.float() * sums[groups.row_group]).sum(1) / groups.positives


class _Groups:
    """Which columns are positives of which rows: columns in order of label, a group being named by its first place."""

    def __init__(self, row_labels: Tensor, col_labels: Tensor) -> None:
        ordered, self.col_order = col_labels.sort(stable=True)
        self.row_group = torch.searchsorted(ordered, row_labels)
        self.positives = torch.searchsorted(ordered, row_labels, right=True) - self.row_group
        self.col_group = torch.searchsorted(ordered, ordered)
        """Of the columns in order."""
        ends = torch.searchsorted(ordered, ordered, right=True)
        place = torch.arange(len(ordered), device=ordered.device)
        self.lengths = torch.where(self.col_group == place, ends - place, 0)
        """Columns in the group that begins at each place, 0 where none begins."""


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
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false."""
    groups, row_order = _Groups(row_labels, col_labels), row_labels.argsort(stable=True)
    col_order, tf32 = groups.col_order, _backend.allows_tf32(rows)
    sorted_rows, sorted_cols = rows[row_order], cols[col_order]
    lse = torch.cat([row_lse, col_lse]) / LN_2
    row_lse, col_lse = lse[: len(rows)][row_order], lse[len(rows) :][col_order]
    statistics = (
        torch.stack([lse.amin(), lse.amax()]) if len(lse) else lse.new_zeros(2),
        row_lse,
        col_lse,
        drow_lse.float()[row_order],
        dcol_lse.float()[col_order],
        (dpositive.float() / groups.positives)[row_order],
        groups.row_group[row_order].int(),
        groups.col_group.int(),
    )
    size = chunk_size or kernels.best_chunk(rows.shape[1], target_of(rows.device))
    scratch = rows.new_empty(min(size, len(rows)), min(size, len(cols)))
    # <rows, G cols> is d scale, so the scale needs the first product too.
    drows, dcols = (torch.zeros_like(x, dtype=torch.float32) for x in (sorted_rows, sorted_cols))
    for first_row in range(0, len(rows), size):
        for first_col in range(0, len(cols), size):
            row_end, col_end = min(first_row + size, len(rows)), min(first_col + size, len(cols))
            grad = scratch[: row_end - first_row, : col_end - first_col]
            spans = (first_row, row_end), (first_col, col_end)
            kernels.contrastive_loss_grad(sorted_rows, sorted_cols, scale.float(), statistics, *spans, grad, tf32)
            if needs[0] or needs[2]:
                _add_product_(drows[first_row:row_end], grad, sorted_cols[first_col:col_end])
            if needs[1]:
                _add_product_(dcols[first_col:col_end], grad.T, sorted_rows[first_row:row_end])
    return (
        _unsorted(drows * scale.float(), row_order).to(rows.dtype) if needs[0] else None,
        _unsorted(dcols * scale.float(), col_order).to(cols.dtype) if needs[1] else None,
        (sorted_rows.float() * drows).sum().to(scale.dtype) if needs[2] else None,
    )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to ``total``, summing in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


def _unsorted(x: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[order] = x
    return out
