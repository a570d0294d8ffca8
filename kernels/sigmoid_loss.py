"""The sigmoid loss of scale * rows cols^T + bias, and its gradient, without the R x N matrix ever being in memory.

Each pair is a question of its own: with u_ij = -logit where labels are equal and +logit where they are not, a pair
costs log(1 + exp u_ij) and the gradient of its logit is -sigmoid(u_ij) or +sigmoid(u_ij). The forward leaves one sum a
row. The backward writes G of a chunk in the dtype of the features, for two products by the library, and one sum of G a
row, of which the gradient of the bias is made. Rows and columns come sorted by label.

FLOPs: 2 R N D forward, 2 R N D for G, and 4 R N D in the library. All sums are float32 and in a fixed order.

Letters: R rows · N columns · D embedding dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.logit_tiles import blocks_meet, config_for, logit_tile, positives, tile_constants
from florence_fast.kernels.targets import target_of

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], by a polynomial whose coefficients are the Chebyshev interpolation of log(1 + x) / x.

    It is right to 3e-7 of its value. Near 0 the logarithm of a rounded 1 + x would lose x itself, and there, for all
    the pairs that are no positives, is where most of them are.
    """
    y = 0.0434939 - x * 0.00837115
    y = y * x - 0.10685003
    y = y * x + 0.17687477
    y = y * x - 0.24474774
    y = y * x + 0.3327193
    y = y * x - 0.49997175
    y = y * x + 0.99999976
    return x * y


@triton.jit
def _signed_logits(
    logits,
    row_label_ptr,
    col_label_ptr,
    row,
    col,
    row_start,
    col_start,
    R,
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Turn the sign of the positives."""
    if blocks_meet(row_label_ptr, col_label_ptr, row_start, col_start, R, N, BLOCK_R, BLOCK_N):
        same = positives(row_label_ptr, col_label_ptr, row, col, R, N)
        logits = tl.where(same, -logits, logits)
    return logits


@triton.jit(do_not_specialize=["R", "N", "num_runs"])
def _sigmoid_loss_fwd_kernel(
    rows_ptr,  # (R, D), sorted by label, as are the columns
    cols_ptr,  # (N, D)
    scale_ptr,  # () float32
    bias_ptr,  # () float32
    row_label_ptr,  # (R,) int32, ascending
    col_label_ptr,  # (N,) int32, ascending
    loss_ptr,  # (runs, R) float32: the sum over the columns of a run
    R,
    N,
    D,
    num_runs,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    run, block = tl.program_id(0) % num_runs, tl.program_id(0) // num_runs
    row_start = block * BLOCK_R
    row = row_start + tl.arange(0, BLOCK_R)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    loss = tl.zeros((BLOCK_R,), tl.float32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tiles * run // num_runs, tiles * (run + 1) // num_runs):
        col_start = tile * BLOCK_N
        col = col_start + tl.arange(0, BLOCK_N)
        logits = logit_tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION) * scale + bias
        logits = _signed_logits(
            logits, row_label_ptr, col_label_ptr, row, col, row_start, col_start, R, N, BLOCK_R, BLOCK_N
        )
        if not WHOLE:
            logits = tl.where((col < N)[None, :], logits, -float("inf"))
        above = tl.maximum(logits, 0.0)
        loss += tl.sum(above + _log1p(tl.exp2(tl.abs(logits) * -_LOG2_E)), 1)
    tl.store(loss_ptr + run.to(tl.int64) * R + row, loss, mask=row < R)


@triton.jit(do_not_specialize=["first_row", "first_col", "R", "N", "col_blocks"])
def _sigmoid_loss_grad_kernel(
    rows_ptr,  # (R, D), sorted by label, as are the columns
    cols_ptr,  # (N, D)
    scale_ptr,  # () float32
    bias_ptr,  # () float32
    drow_ptr,  # (R,) float32: the gradient of each row's loss
    row_label_ptr,  # (R,) int32, ascending
    col_label_ptr,  # (N,) int32, ascending
    grad_ptr,  # (rows, columns) of the chunk that begins at first_row and first_col
    grad_sum_ptr,  # (column blocks, rows) of the chunk, float32: the sum of G over each block
    first_row,
    first_col,
    R,
    N,
    D,
    grad_stride,
    col_blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of one tile of logits; R and N end the chunk."""
    block_r, block_c = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    i, j = block_r * BLOCK_R + tl.arange(0, BLOCK_R), block_c * BLOCK_N + tl.arange(0, BLOCK_N)
    row_start, col_start = first_row + block_r * BLOCK_R, first_col + block_c * BLOCK_N
    row, col = first_row + i, first_col + j
    row_real, col_real = row < R, col < N
    logits = logit_tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION)
    logits = logits * tl.load(scale_ptr) + tl.load(bias_ptr)
    drow = tl.load(drow_ptr + row, mask=row_real, other=0.0)
    signed = _signed_logits(
        logits, row_label_ptr, col_label_ptr, row, col, row_start, col_start, R, N, BLOCK_R, BLOCK_N
    )
    grad = drow[:, None] / (1.0 + tl.exp2(signed * -_LOG2_E))
    grad = _signed_logits(grad, row_label_ptr, col_label_ptr, row, col, row_start, col_start, R, N, BLOCK_R, BLOCK_N)
    if not WHOLE:
        grad = tl.where(col_real[None, :], grad, 0.0)
    tl.store(grad_sum_ptr + block_c.to(tl.int64) * (R - first_row) + i, tl.sum(grad, 1), mask=row_real)
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + j[None, :]
    if WHOLE:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=row_real[:, None] & col_real[None, :])


def sigmoid_loss_fwd(
    rows: Tensor, cols: Tensor, scale: Tensor, bias: Tensor, row_labels: Tensor, col_labels: Tensor, tf32: bool
) -> Tensor:
    """Return the loss of each row over all columns, (R,) float32; rows and columns are sorted by label."""
    (num_rows, depth), num_cols, target = rows.shape, len(cols), target_of(rows.device)
    if num_rows == 0 or num_cols == 0:
        return rows.new_zeros(num_rows, dtype=torch.float32)
    constants = tile_constants(rows.dtype, target.arch, num_rows, num_cols, depth, tf32)
    block_r, block_n, *_ = constants
    config = config_for("sigmoid_loss_fwd", target, rows.dtype, depth)
    row_blocks, at_once = triton.cdiv(num_rows, block_r), target.num_sms * config.programs_per_sm
    runs = max(1, min(triton.cdiv(num_cols, block_n), at_once // row_blocks))
    loss = rows.new_empty(runs, num_rows, dtype=torch.float32)
    _sigmoid_loss_fwd_kernel[(row_blocks * runs,)](
        rows,
        cols,
        scale,
        bias,
        row_labels,
        col_labels,
        loss,
        num_rows,
        num_cols,
        depth,
        runs,
        *constants,
        **config.options,
    )
    return loss.sum(0)


def sigmoid_loss_grad(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    drow: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    row_span: tuple[int, int],
    col_span: tuple[int, int],
    grad: Tensor,
    tf32: bool,
) -> Tensor:
    """Write G of a chunk of rows and columns into ``grad``; return its sum, () float32."""
    depth, target = rows.shape[1], target_of(rows.device)
    config = config_for("sigmoid_loss_grad", target, rows.dtype, depth)
    num_rows, num_cols = row_span[1] - row_span[0], col_span[1] - col_span[0]
    constants = tile_constants(rows.dtype, target.arch, num_rows, num_cols, depth, tf32)
    block_r, block_n, *_ = constants
    col_blocks = triton.cdiv(num_cols, block_n)
    grad_sum = rows.new_empty(col_blocks, num_rows, dtype=torch.float32)
    _sigmoid_loss_grad_kernel[(triton.cdiv(num_rows, block_r) * col_blocks,)](
        rows,
        cols,
        scale,
        bias,
        drow,
        row_labels,
        col_labels,
        grad,
        grad_sum,
        row_span[0],
        col_span[0],
        row_span[1],
        col_span[1],
        depth,
        grad.stride(0),
        col_blocks,
        *constants,
        **config.options,
    )
    return grad_sum.sum()
