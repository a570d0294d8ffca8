"""The ``triton`` backend of the contrastive loss: kernels for what has R x N elements, the library for products.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

import math

import torch
from torch import Tensor

from florence_fast.kernels import contrastive_loss as kernels
from florence_fast.ops import dispatch
from florence_fast.ops.logits.by_label import ByLabel, unsorted
from florence_fast.ops.logits.triton import Span, chunked_gradients

SCRATCH_BYTES = 128 << 20
LN_2 = math.log(2)


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
    row_top, row_rest, col_top, col_rest, positive = kernels.contrastive_loss_fwd(
        ordered.rows,
        ordered.cols,
        scale.float(),
        ordered.row_labels,
        ordered.col_labels,
        SCRATCH_BYTES,
        dispatch.allows_tf32(rows),
    )
    row = unsorted(torch.stack([row_top, row_rest, positive], 1) * LN_2, ordered.row_order)
    col = unsorted(torch.stack([col_top, col_rest], 1) * LN_2, ordered.col_order)
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
    ordered, tf32 = ByLabel(rows, cols, row_labels, col_labels), dispatch.allows_tf32(rows)
    row_order, col_order = ordered.row_order, ordered.col_order
    lse = torch.cat([row_lse, col_lse]) / LN_2
    statistics = (
        torch.stack([lse.amin(), lse.amax()]) if len(lse) else lse.new_zeros(2),
        lse[: len(rows)][row_order],
        lse[len(rows) :][col_order],
        drow_lse.float()[row_order],
        dcol_lse.float()[col_order],
        (dpositive.float() * weight)[row_order],
        ordered.row_labels,
        ordered.col_labels,
    )

    def write_grad(row_span: Span, col_span: Span, grad: Tensor) -> None:
        kernels.contrastive_loss_grad(
            ordered.rows, ordered.cols, scale.float(), statistics, row_span, col_span, grad, tf32
        )

    return chunked_gradients(ordered, scale, needs, chunk_size, write_grad)
