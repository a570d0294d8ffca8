"""Tiles of the logits rows cols^T, which are in registers and never in memory: what both contrastive losses share.

Rows and columns come sorted by label, so that positives lie near the diagonal and most tiles compare no labels.

Letters: R rows · N columns · D embedding dim.
"""

import torch
import triton
import triton.language as tl

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import Target


@triton.jit
def logit_tile(
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


@triton.jit
def blocks_meet(
    row_label_ptr,
    col_label_ptr,
    row_start,
    col_start,
    row_end,
    col_end,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Say whether two blocks can have a label in common: labels ascend, so each begins before the other ends."""
    row_least = tl.load(row_label_ptr + row_start)
    row_most = tl.load(row_label_ptr + tl.minimum(row_start + BLOCK_R, row_end) - 1)
    col_least = tl.load(col_label_ptr + col_start)
    col_most = tl.load(col_label_ptr + tl.minimum(col_start + BLOCK_N, col_end) - 1)
    return (row_least <= col_most) & (col_least <= row_most)


@triton.jit
def positives(row_label_ptr, col_label_ptr, row, col, row_end, col_end):
    """Return which elements of a tile have equal labels; none of those beyond the last row or column."""
    row_label = tl.load(row_label_ptr + row, mask=row < row_end, other=-1)
    col_label = tl.load(col_label_ptr + col, mask=col < col_end, other=-2)
    return row_label[:, None] == col_label[None, :]


def block_sizes(dtype: torch.dtype, arch: int, depth: int) -> tuple[int, int, int]:
    """Return BLOCK_R, BLOCK_N and BLOCK_D: what registers and shared memory hold."""
    if dtype == torch.float32:
        block_r, block_n, block_d = 64, 64, 32
    else:
        # A tile of 128 x 128 reads its operands from shared memory as fast as HGMMA multiplies them, and no faster.
        block_r, block_n, block_d = (256, 128, 64) if arch >= 90 else (128, 128, 32)
    return block_r, block_n, max(16, min(block_d, triton.next_power_of_2(depth)))


def tile_constants(
    dtype: torch.dtype, arch: int, num_rows: int, num_cols: int, depth: int, tf32: bool
) -> tuple[int, int, int, bool, bool, str]:
    """Return what ends the arguments of every kernel here: BLOCK_R, BLOCK_N, BLOCK_D, EVEN_D, WHOLE and PRECISION."""
    block_r, block_n, block_d = block_sizes(dtype, arch, depth)
    whole = num_rows % block_r == 0 and num_cols % block_n == 0
    return block_r, block_n, block_d, depth % block_d == 0, whole, "tf32" if tf32 else "ieee"


def config_for(kernel: str, target: Target, dtype: torch.dtype, depth: int) -> Config:
    """Return the launch configuration of a kernel that computes tiles."""
    default = Config(4, 2, 2) if dtype == torch.float32 else Config(8, 3, 1)
    return config_of(kernel, target.arch, dtype, 0, depth, default)


def best_chunk(depth: int, target: Target) -> int:
    """Return how many rows and columns make a chunk whose products with D columns fill the multiprocessors evenly.

    The library's tiles are taken to be 128 x 256.
    """

    def use(chunk: int) -> float:
        tiles = triton.cdiv(chunk, 128) * triton.cdiv(depth, 256)
        return tiles / (triton.cdiv(tiles, target.num_sms) * target.num_sms)

    return max(range(4096, 8192 + 1, 512), key=lambda chunk: (round(use(chunk), 2), chunk))
