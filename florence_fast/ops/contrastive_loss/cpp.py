"""The ``cpp`` backend of the contrastive loss: a native pass over each chunk of logits, library products around it.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.cpp import Chunk, Chunks, chunked_gradients


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
    for r, c, logits in chunks:
        of_rows, of_cols = (row_top[r], row_sum[r]), (col_top[c], col_sum[c])
        runs = chunks.begin[r], chunks.end[r]
        native.call("contrastive_loss_fwd", *logits.shape, c.start, logits, *runs, *of_rows, *of_cols, positive[r])
        del logits
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
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false."""
    ordered = ByLabel(rows, cols, row_labels, col_labels)
    of_rows = [x.float()[ordered.row_order] for x in (row_lse, drow_lse, dpositive * weight)]
    of_cols = [x.float()[ordered.col_order] for x in (col_lse, dcol_lse)]

    def write_grad(chunks: Chunks, chunk: Chunk, grad: Tensor, by_logit: Tensor) -> None:
        r, c, logits = chunk
        lse, d_lse, d_positive = (x[r] for x in of_rows)
        native.call(
            *("contrastive_loss_bwd", grad.dtype, *logits.shape, c.start, logits, chunks.begin[r], chunks.end[r]),
            *(lse, d_lse, *(x[c] for x in of_cols), d_positive, grad, by_logit),
        )

    return chunked_gradients(ordered, scale, needs, chunk_size, write_grad)
