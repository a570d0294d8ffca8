"""Row and column statistics of scale * rows cols^T, and its gradient, without the R x N matrix ever being in memory.

The forward computes each tile of logits once and takes both directions from it: a program owns a block of rows, keeps
their running maximum and sum in registers over its run of column blocks, and leaves one maximum and sum a tile for
each column. Positives are summed from the same tile: a loss near 0 is the difference of a maximum and a positive, which
cancel exactly if they are one number. The backward computes a tile again from its features and writes its gradient

    G_ij = drow_i exp(s_ij - row_lse_i) + dcol_j exp(s_ij - col_lse_j) + dpositive_i [y_i = y_j]

in the dtype of the features into a scratch of fixed size, for two products by the library, G cols and G^T rows. What
is subtracted at the positives is inside G before it is rounded: a probability near 1 cancels against it there. Rows
and columns come sorted by label.

FLOPs: 2 R N D forward, 2 R N D for G, and 4 R N D in the library. All sums are float32 and in a fixed order.

Compiled for sm_80 and sm_90 in 16 bits it must show tensor instructions in its loop, 16-byte loads and no stack.

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
_NEAR = tl.constexpr(100.0)
"""So far apart may log-sum-exps be, in base 2, that the power of two of each difference is a float32."""


@triton.jit(do_not_specialize=["first_row", "R", "N", "num_runs"])
def _contrastive_loss_fwd_kernel(
    rows_ptr,  # (R, D), sorted by label, as are the columns
    cols_ptr,  # (N, D)
    scale_ptr,  # () float32
    row_label_ptr,  # (R,) int32, ascending
    col_label_ptr,  # (N,) int32, ascending
    row_top_ptr,  # (runs, R) float32: the largest logit in base 2, and
    row_sum_ptr,  # (runs, R) float32: the sum of 2^(logit - it), over the columns of a run, and
    positive_ptr,  # (runs, R) float32: the sum of the positive logits in base 2
    col_top_ptr,  # (row blocks of this call, N) float32: maximum and
    col_sum_ptr,  # (row blocks of this call, N) float32: sum over a block of rows
    first_row,
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
    row_start = first_row + block * BLOCK_R
    row = row_start + tl.arange(0, BLOCK_R)
    scale = tl.load(scale_ptr) * _LOG2_E
    row_top, row_sum = tl.full((BLOCK_R,), -float("inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    positive = tl.zeros((BLOCK_R,), tl.float32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tiles * run // num_runs, tiles * (run + 1) // num_runs):
        col_start = tile * BLOCK_N
        col = col_start + tl.arange(0, BLOCK_N)
        logits = logit_tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION) * scale
        if blocks_meet(row_label_ptr, col_label_ptr, row_start, col_start, R, N, BLOCK_R, BLOCK_N):
            same = positives(row_label_ptr, col_label_ptr, row, col, R, N)
            positive += tl.sum(tl.where(same, logits, 0.0), 1)
        if not WHOLE:
            logits = tl.where((row < R)[:, None] & (col < N)[None, :], logits, -float("inf"))
        # A row or column beyond the last holds nothing but -inf, whose difference from itself would be NaN.
        top = tl.maximum(row_top, tl.max(logits, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        row_sum = row_sum * tl.exp2(row_top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        row_top = top
        top = tl.max(logits, 0)
        shift = tl.where(top == -float("inf"), 0.0, top)
        column = block.to(tl.int64) * N + col
        tl.store(col_top_ptr + column, top, mask=col < N)
        tl.store(col_sum_ptr + column, tl.sum(tl.exp2(logits - shift[None, :]), 0), mask=col < N)
    place = run.to(tl.int64) * R + row
    tl.store(row_top_ptr + place, row_top, mask=row < R)
    tl.store(row_sum_ptr + place, row_sum, mask=row < R)
    tl.store(positive_ptr + place, positive, mask=row < R)


@triton.jit(do_not_specialize=["first_row", "first_col", "R", "N", "col_blocks"])
def _contrastive_loss_grad_kernel(
    rows_ptr,  # (R, D), sorted by label, as are the columns
    cols_ptr,  # (N, D)
    scale_ptr,  # () float32
    lse_range_ptr,  # (2,) float32: the least and the greatest log-sum-exp, in base 2
    row_lse_ptr,  # (R,) float32, in base 2
    col_lse_ptr,  # (N,) float32, in base 2
    drow_ptr,  # (R,) float32
    dcol_ptr,  # (N,) float32
    dpositive_ptr,  # (R,) float32: the gradient of each positive logit
    row_label_ptr,  # (R,) int32, ascending
    col_label_ptr,  # (N,) int32, ascending
    grad_ptr,  # (rows, columns) of the chunk that begins at first_row and first_col
    first_row,
    first_col,
    R,
    N,
    D,
    grad_stride,
    col_blocks,
    FAR_APART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of one tile of logits; R and N end the chunk.

    While no two log-sum-exps are far apart, one exponential serves both directions; the form with two, FAR_APART,
    needs twice the registers. Both are launched, and one of them has nothing to do.
    """
    least, greatest = tl.load(lse_range_ptr), tl.load(lse_range_ptr + 1)
    if (greatest - least > _NEAR) != FAR_APART:
        return
    block_r, block_c = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    i, j = block_r * BLOCK_R + tl.arange(0, BLOCK_R), block_c * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = first_row + i, first_col + j
    logits = logit_tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION)
    row_real, col_real = row < R, col < N
    row_lse, drow = tl.load(row_lse_ptr + row, mask=row_real), tl.load(drow_ptr + row, mask=row_real)
    col_lse, dcol = tl.load(col_lse_ptr + col, mask=col_real), tl.load(dcol_ptr + col, mask=col_real)
    scale = tl.load(scale_ptr) * _LOG2_E
    by_row = tl.exp2(logits * scale - row_lse[:, None])
    if FAR_APART:
        grad = by_row * drow[:, None] + tl.exp2(logits * scale - col_lse[None, :]) * dcol[None, :]
    else:
        middle = 0.5 * (least + greatest)
        by_col = tl.exp2(row_lse - middle)[:, None] * (dcol * tl.exp2(middle - col_lse))[None, :]
        grad = by_row * (drow[:, None] + by_col)
    row_start, col_start = first_row + block_r * BLOCK_R, first_col + block_c * BLOCK_N
    if blocks_meet(row_label_ptr, col_label_ptr, row_start, col_start, R, N, BLOCK_R, BLOCK_N):
        dpositive = tl.load(dpositive_ptr + row, mask=row_real, other=0.0)
        same = positives(row_label_ptr, col_label_ptr, row, col, R, N)
        grad += tl.where(same, dpositive[:, None], 0.0)
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + j[None, :]
    if WHOLE:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=row_real[:, None] & col_real[None, :])


def contrastive_loss_fwd(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    scratch_bytes: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return, in base 2 and float32, what is known of each row and column; rows and columns are sorted by label.

    ``scratch_bytes`` bounds the statistics of columns that are kept at a time.

    Returns:
        The largest logit of each row (R,) and log2 of the sum of 2^(logit - it) (R,), the same of each column (N,) and
        (N,), both -inf where there is nothing, and the sum of each row's positive logits (R,).
    """
    (num_rows, depth), num_cols, target = rows.shape, len(cols), target_of(rows.device)
    if num_rows == 0 or num_cols == 0:
        row, col = (rows.new_full((length,), -math.inf, dtype=torch.float32) for length in (num_rows, num_cols))
        return row, row, col, col, torch.zeros_like(row)
    constants = tile_constants(rows.dtype, target.arch, num_rows, num_cols, depth, tf32)
    block_r, block_n, *_ = constants
    config = config_for("contrastive_loss_fwd", target, rows.dtype, depth)
    row_blocks, at_once = triton.cdiv(num_rows, block_r), target.num_sms * config.programs_per_sm
    runs = max(1, min(triton.cdiv(num_cols, block_n), at_once // row_blocks))
    step = max(1, min(row_blocks, scratch_bytes // (8 * num_cols)))
    row_top, row_sum, positive = (rows.new_empty(runs, num_rows, dtype=torch.float32) for _ in range(3))
    col_parts = []
    for first in range(0, row_blocks, step):
        blocks = min(step, row_blocks - first)
        col_top, col_sum = (rows.new_empty(blocks, num_cols, dtype=torch.float32) for _ in range(2))
        _contrastive_loss_fwd_kernel[(blocks * runs,)](
            rows,
            cols,
            scale,
            row_labels,
            col_labels,
            row_top,
            row_sum,
            positive,
            col_top,
            col_sum,
            first * block_r,
            num_rows,
            num_cols,
            depth,
            runs,
            *constants,
            **config.options,
        )
        col_parts.append(_join(col_top, col_sum))
    if len(col_parts) > 1:
        top, rest = map(torch.stack, zip(*col_parts, strict=True))
        col_parts = [_join(top, rest.exp2())]
    return *_join(row_top, row_sum), *col_parts[0], positive.sum(0)


def _join(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the greatest of the first axis, and log2 sum_k total_k 2^(top_k - greatest) over it."""
    greatest = top.amax(0)
    return greatest, (total * (top - greatest).exp2()).sum(0).log2()


def contrastive_loss_grad(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor, ...],
    row_span: tuple[int, int],
    col_span: tuple[int, int],
    grad: Tensor,
    tf32: bool,
) -> None:
    """Write G of a chunk of rows and columns into ``grad``; ``statistics`` are lse_range_ptr to col_label_ptr."""
    depth, target = rows.shape[1], target_of(rows.device)
    config = config_for("contrastive_loss_grad", target, rows.dtype, depth)
    num_rows, num_cols = row_span[1] - row_span[0], col_span[1] - col_span[0]
    constants = tile_constants(rows.dtype, target.arch, num_rows, num_cols, depth, tf32)
    block_r, block_n, *_ = constants
    col_blocks = triton.cdiv(num_cols, block_n)
    for far_apart in (False, True):
        _contrastive_loss_grad_kernel[(triton.cdiv(num_rows, block_r) * col_blocks,)](
            rows,
            cols,
            scale,
            *statistics,
            grad,
            row_span[0],
            col_span[0],
            row_span[1],
            col_span[1],
            depth,
            grad.stride(0),
            col_blocks,
            far_apart,
            *constants,
            **config.options,
        )
