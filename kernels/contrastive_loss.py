"""Row and column statistics of scale * rows cols^T, and its gradient, without the R x N matrix ever being in memory.

The forward computes each tile of logits once and takes both directions from it: a program owns a block of rows, keeps
their running maximum and sum in registers over its run of column blocks, and leaves one maximum and sum a tile for
each column. The backward computes a tile again from its features and writes its gradient

    G_ij = drow_i exp(s_ij - row_lse_i) + dcol_j exp(s_ij - col_lse_j) + dpositive_i [y_i = y_j] / |P(i)|

in the dtype of the features into a scratch of fixed size, for two products by the library, G cols and G^T rows. What
is subtracted at the positives is inside G before it is rounded: a probability near 1 cancels against it there. Rows
and columns come sorted by label, so that only tiles near the diagonal compare labels.

FLOPs: 2 R N D forward, 2 R N D for G, and 4 R N D in the library. All sums are float32 and in a fixed order.

Compiled for sm_80 and sm_90 in 16 bits it must show tensor instructions in its loop, 16-byte loads and no stack.

Letters: R rows · N columns · D embedding dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import Target, target_of

_LOG2_E = tl.constexpr(math.log2(math.e))
_NEAR = tl.constexpr(100.0)
"""So far apart may log-sum-exps be, in base 2, that the power of two of each difference is a float32."""


@triton.jit
def _tile(
    rows_ptr,
    cols_ptr,
    row,
    col,
    R,
    N,
    D,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product of the rows and columns of these numbers; those beyond the last, if not WHOLE, read zeros."""
    d = tl.arange(0, BLOCK_D)
    a_ptr = rows_ptr + row[:, None].to(tl.int64) * D + d[None, :]
    b_ptr = cols_ptr + col[:, None].to(tl.int64) * D + d[None, :]
    total = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        if WHOLE and EVEN_D:
            a, b = tl.load(a_ptr), tl.load(b_ptr)
        else:
            in_depth = d[None, :] < D - first
            a = tl.load(a_ptr, mask=(row[:, None] < R) & in_depth, other=0.0)
            b = tl.load(b_ptr, mask=(col[:, None] < N) & in_depth, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        a_ptr += BLOCK_D
        b_ptr += BLOCK_D
    return total


@triton.jit(do_not_specialize=["first_row", "R", "N", "num_runs"])
def _contrastive_loss_fwd_kernel(
    rows_ptr,  # (R, D)
    cols_ptr,  # (N, D)
    scale_ptr,  # () float32
    row_top_ptr,  # (runs, R) float32: the largest logit in base 2, and
    row_sum_ptr,  # (runs, R) float32: the sum of 2^(logit - it), over the columns of a run
    col_top_ptr,  # (row blocks of this call, N) float32: the same over a block of rows
    col_sum_ptr,  # (row blocks of this call, N) float32
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
    row = first_row + block * BLOCK_R + tl.arange(0, BLOCK_R)
    scale = tl.load(scale_ptr) * _LOG2_E
    row_top, row_sum = tl.full((BLOCK_R,), -float("inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tiles * run // num_runs, tiles * (run + 1) // num_runs):
        col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        logits = _tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION) * scale
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


@triton.jit
def _label_range(label_ptr, start, LENGTH: tl.constexpr, end):
    """First and last of LENGTH ascending labels from ``start`` on, of which there are ``end``."""
    return tl.load(label_ptr + start), tl.load(label_ptr + tl.minimum(start + LENGTH, end) - 1)


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
    target_ptr,  # (R,) float32: the gradient of each positive logit
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
    logits = _tile(rows_ptr, cols_ptr, row, col, R, N, D, BLOCK_D, EVEN_D, WHOLE, PRECISION)
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
    # Labels ascend, so two blocks share one only if each begins before the other ends.
    row_start, col_start = first_row + block_r * BLOCK_R, first_col + block_c * BLOCK_N
    row_least, row_most = _label_range(row_label_ptr, row_start, BLOCK_R, R)
    col_least, col_most = _label_range(col_label_ptr, col_start, BLOCK_N, N)
    if (row_least <= col_most) & (col_least <= row_most):
        row_label = tl.load(row_label_ptr + row, mask=row_real, other=-1)
        col_label = tl.load(col_label_ptr + col, mask=col_real, other=-2)
        target = tl.load(target_ptr + row, mask=row_real, other=0.0)
        grad += tl.where(row_label[:, None] == col_label[None, :], target[:, None], 0.0)
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + j[None, :]
    if WHOLE:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=row_real[:, None] & col_real[None, :])


def _blocks(dtype: torch.dtype, arch: int, depth: int) -> tuple[int, int, int]:
    """Return BLOCK_R, BLOCK_N and BLOCK_D: what registers and shared memory hold."""
    if dtype == torch.float32:
        block_r, block_n, block_d = 64, 64, 32
    else:
        # A tile of 128 x 128 reads its operands from shared memory as fast as HGMMA multiplies them, and no faster.
        block_r, block_n, block_d = (256, 128, 64) if arch >= 90 else (128, 128, 32)
    return block_r, block_n, max(16, min(block_d, triton.next_power_of_2(depth)))


def _config(kernel: str, target: Target, dtype: torch.dtype, depth: int, warps: int, stages: int) -> Config:
    default = Config(warps, 2, 2) if dtype == torch.float32 else Config(warps, stages, 1)
    return config_of(kernel, target.arch, dtype, 0, depth, default)


def contrastive_loss_fwd(
    rows: Tensor, cols: Tensor, scale: Tensor, scratch_bytes: int, tf32: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp in base 2 of every row (R,) and column (N,), in float32; -inf where there is nothing.

    ``scratch_bytes`` bounds the statistics of columns that are kept at a time.
    """
    (num_rows, depth), num_cols, target = rows.shape, len(cols), target_of(rows.device)
    col_lse = rows.new_full((num_cols,), -math.inf, dtype=torch.float32)
    if num_rows == 0 or num_cols == 0:
        return rows.new_full((num_rows,), -math.inf, dtype=torch.float32), col_lse
    block_r, block_n, block_d = _blocks(rows.dtype, target.arch, depth)
    config = _config("contrastive_loss_fwd", target, rows.dtype, depth, 4 if rows.dtype == torch.float32 else 8, 3)
    row_blocks, at_once = triton.cdiv(num_rows, block_r), target.num_sms * config.programs_per_sm
    runs = max(1, min(triton.cdiv(num_cols, block_n), at_once // row_blocks))
    step = max(1, min(row_blocks, scratch_bytes // (8 * num_cols)))
    row_top, row_sum = (rows.new_empty(runs, num_rows, dtype=torch.float32) for _ in range(2))
    for first in range(0, row_blocks, step):
        blocks = min(step, row_blocks - first)
        col_top, col_sum = (rows.new_empty(blocks, num_cols, dtype=torch.float32) for _ in range(2))
        _contrastive_loss_fwd_kernel[(blocks * runs,)](
            rows,
            cols,
            scale,
            row_top,
            row_sum,
            col_top,
            col_sum,
            first * block_r,
            num_rows,
            num_cols,
            depth,
            runs,
            block_r,
            block_n,
            block_d,
            depth % block_d == 0,
            num_rows % block_r == 0 and num_cols % block_n == 0,
            "tf32" if tf32 else "ieee",
            **config.options,
        )
        col_lse = torch.logaddexp2(col_lse, _join(col_top, col_sum))
    return _join(row_top, row_sum), col_lse


def _join(top: Tensor, total: Tensor) -> Tensor:
    """Return log2 sum_k total_k 2^top_k over the first axis."""
    greatest = top.amax(0)
    return greatest + (total * (top - greatest).exp2()).sum(0).log2()


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
    block_r, block_n, block_d = _blocks(rows.dtype, target.arch, depth)
    warps = 4 if rows.dtype == torch.float32 else 8
    config = _config("contrastive_loss_grad", target, rows.dtype, depth, warps, 3)
    num_rows, num_cols = row_span[1] - row_span[0], col_span[1] - col_span[0]
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
            block_r,
            block_n,
            block_d,
            depth % block_d == 0,
            num_rows % block_r == 0 and num_cols % block_n == 0,
            "tf32" if tf32 else "ieee",
            **config.options,
        )


def best_chunk(depth: int, target: Target) -> int:
    """Return how many rows and columns make a chunk whose products with D columns fill the multiprocessors evenly.

    The library's tiles are taken to be 128 x 256.
    """

    def use(chunk: int) -> float:
        tiles = triton.cdiv(chunk, 128) * triton.cdiv(depth, 256)
        return tiles / (triton.cdiv(tiles, target.num_sms) * target.num_sms)

    return max(range(4096, 8192 + 1, 512), key=lambda chunk: (round(use(chunk), 2), chunk))
