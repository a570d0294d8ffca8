"""The ``torch`` backend of the sigmoid loss: library calls on one chunk of logits at a time.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.torch import Chunk, Chunks, chunked_gradients


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
    loss = chunks.rows.new_zeros(len(rows))
    for chunk in chunks:
        logits = chunk.logits.add_(bias).neg_()
        _turn_positives(chunks, chunk)
        loss[chunk.rows] -= F.logsigmoid(logits).sum(1)
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
    drow, dbias = drow[ordered.row_order], torch.zeros_like(bias, dtype=drow.dtype)

    def write_grad(chunks: Chunks, chunk: Chunk) -> None:
        chunk.logits.add_(bias)
        _turn_positives(chunks, chunk)
        chunk.logits.sigmoid_().mul_(drow[chunk.rows, None])
        _turn_positives(chunks, chunk)
        dbias.add_(chunk.logits.sum())

    grads = chunked_gradients(ordered, scale, needs[:3], chunk_size, write_grad)
    return *grads, dbias.to(bias.dtype) if needs[3] else None


def _turn_positives(chunks: Chunks, chunk: Chunk) -> None:
    """Turn the sign of what stands at the positives."""
    for some_rows, some_cols, same in chunks.positives(chunk):
        part = chunk.logits[some_rows, some_cols]
        part.copy_(torch.where(same, -part, part))
