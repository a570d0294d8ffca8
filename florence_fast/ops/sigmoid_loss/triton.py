"""The ``triton`` backend of the sigmoid loss: kernels for what has R x N elements, the library for products.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import torch
from torch import Tensor

from florence_fast.kernels import sigmoid_loss as kernels
from florence_fast.ops import dispatch
from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.triton import Span, chunked_gradients


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
    loss = kernels.sigmoid_loss_fwd(
        ordered.rows,
        ordered.cols,
        scale.float(),
        bias.float(),
        ordered.row_labels,
        ordered.col_labels,
        dispatch.allows_tf32(rows),
    )
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
    ordered, tf32 = ByLabel(rows, cols, row_labels, col_labels), dispatch.allows_tf32(rows)
    drow, dbias = drow.float()[ordered.row_order], torch.zeros_like(bias, dtype=torch.float32)

    def write_grad(row_span: Span, col_span: Span, grad: Tensor) -> None:
        dbias.add_(
            kernels.sigmoid_loss_grad(
                ordered.rows,
                ordered.cols,
                scale.float(),
                bias.float(),
                drow,
                ordered.row_labels,
                ordered.col_labels,
                row_span,
                col_span,
                grad,
                tf32,
            )
        )

    grads = chunked_gradients(ordered, scale, needs[:3], chunk_size, write_grad)
    return *grads, dbias.to(bias.dtype) if needs[3] else None
