"""The ``cpp`` backend of the sigmoid loss: a native pass over each chunk of logits, library products around it.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.cpp import Chunk, Chunks, chunked_gradients


def sigmoid_loss_fwd(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    chunk_size: int,
) -> Tensor:
    """Return the loss of every row over all columns, (R,)."""
    ordered = ByLabel(rows, cols, row_labels, col_labels)
    chunks = Chunks(ordered, scale, chunk_size)
    loss, shift = chunks.rows.new_zeros(len(rows)), bias.item()
    for r, c, logits in chunks:
        sizes = (*logits.shape, c.start, shift)
        native.call("sigmoid_loss_fwd", *sizes, logits, chunks.begin[r], chunks.end[r], loss[r])
        del logits
    return unsorted(loss, ordered.row_order)


def sigmoid_loss_bwd(
    drow: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    needs: list[bool],
    chunk_size: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D), scale () and bias (), None where ``needs`` is false."""
    ordered = ByLabel(rows, cols, row_labels, col_labels)
    drow, shift = drow.float()[ordered.row_order], bias.item()
    sums = torch.zeros_like(drow)

    def write_grad(chunks: Chunks, chunk: Chunk, grad: Tensor, by_logit: Tensor) -> None:
        r, c, logits = chunk
        native.call(
            *("sigmoid_loss_bwd", grad.dtype, *logits.shape, c.start, shift),
            *(logits, chunks.begin[r], chunks.end[r], drow[r], grad, sums[r], by_logit),
        )

    grads = chunked_gradients(ordered, scale, needs[:3], chunk_size, write_grad)
    return *grads, sums.sum(dtype=torch.float64).to(bias.dtype) if needs[3] else None
