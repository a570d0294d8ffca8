"""The sigmoid loss by library calls: one tile of logits at a time, in a scratch of fixed size.

Letters: R rows (images) · N columns (texts) · D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._contrastive_loss_torch import accumulation_dtype, chunked_gradients, tiles


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
    rows, cols, scale, bias = accumulation_dtype(rows, cols, scale, bias)
    loss = rows.new_zeros(len(rows))
    for r, c in tiles(len(rows), len(cols), chunk_size):
        logits = (rows[r] @ cols[c].T).mul_(scale).add_(bias)
        same = row_labels[r, None] == col_labels[c]
        loss[r] -= F.logsigmoid(torch.where(same, logits, -logits)).sum(1)
    return loss


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
    wide_bias = bias.to(torch.promote_types(rows.dtype, torch.float32))
    dbias = torch.zeros_like(wide_bias)

    def write_grad(logits: Tensor, r: slice, c: slice) -> Tensor:
        sign = torch.where(row_labels[r, None] == col_labels[c], -drow[r, None], drow[r, None])
        signed = torch.where(row_labels[r, None] == col_labels[c], -logits - wide_bias, logits + wide_bias)
        grad = signed.sigmoid_().mul_(sign)
        dbias.add_(grad.sum())
        return grad

    grads = chunked_gradients(rows, cols, scale, needs[:3], chunk_size, write_grad)
    return *grads, dbias.to(bias.dtype) if needs[3] else None
