"""The ``torch`` backend of the contrastive loss: library calls on one chunk of logits at a time.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import torch
from torch import Tensor

from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.torch import Chunk, Chunks, chunked_gradients

NEAR = 30.0
"""So far from their middle may log-sum-exps be that the exponential of what lies between two of them is a float32, and
stays one when a scaled gradient multiplies it."""


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
    ordered = ByLabel(rows, cols, row_labels, col_labels)
    chunks = Chunks(ordered, scale, chunk_size)
    row_top, col_top = (x.new_full((len(x),), -torch.inf) for x in (chunks.rows, chunks.cols))
    row_sum, col_sum, positive = torch.zeros_like(row_top), torch.zeros_like(col_top), torch.zeros_like(row_top)
    for chunk in chunks:
        r, c, logits, scratch = chunk
        for some_rows, some_cols, same in chunks.positives(chunk):
            positive[r][some_rows] += torch.where(same, logits[some_rows, some_cols], 0).sum(1)
        # A second exponential for the columns: made from that of the rows by a factor, it would lose a loss near 0.
        for top, total, axis in ((row_top[r], row_sum[r], 1), (col_top[c], col_sum[c], 0)):
            greater = torch.maximum(top, logits.amax(axis))
            exponentials = torch.sub(logits, greater.unsqueeze(axis), out=scratch).exp_()
            total.mul_((top - greater).exp_()).add_(exponentials.sum(axis))
            top.copy_(greater)
    row = unsorted(torch.stack([row_top, row_sum.log_(), positive], 1), ordered.row_order)
    col = unsorted(torch.stack([col_top, col_sum.log_()], 1), ordered.col_order)
    return row[:, 0], row[:, 1], col[:, 0], col[:, 1], row[:, 2] * weight


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
    ordered = ByLabel(rows, cols, row_labels, col_labels)
    row_order, col_order = ordered.row_order, ordered.col_order
    row_lse, drow_lse, dpositive = (x[row_order] for x in (row_lse, drow_lse, dpositive * weight))
    col_lse, dcol_lse = col_lse[col_order], dcol_lse[col_order]
    lse = torch.cat([row_lse, col_lse])
    middle = (lse.max() + lse.min()) / 2 if len(lse) else lse.sum()
    near = bool(((lse - middle).abs() < NEAR).all())
    of_row, of_col = (row_lse - middle).exp_(), (middle - col_lse).exp_().mul_(dcol_lse)

    def write_grad(chunks: Chunks, chunk: Chunk) -> None:
        r, c, logits, scratch = chunk
        if near:
            # exp(l - col) is exp(l - row) exp(row - middle) exp(middle - col): one exponential an element serves both.
            logits.sub_(row_lse[r, None]).exp_()
            logits.mul_(torch.addcmul(drow_lse[r, None], of_row[r, None], of_col[c], out=scratch))
        else:
            torch.sub(logits, col_lse[c], out=scratch).exp_().mul_(dcol_lse[c])
            logits.sub_(row_lse[r, None]).exp_().mul_(drow_lse[r, None]).add_(scratch)
        for some_rows, some_cols, same in chunks.positives(chunk):
            logits[some_rows, some_cols] += torch.where(same, dpositive[r][some_rows, None], 0)

    return chunked_gradients(ordered, scale, needs, chunk_size, write_grad)
