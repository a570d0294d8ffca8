"""Window attention at the stages of the paper's models, beside everything that computes the same.

Letters: H W map height and width · C channels · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math

import torch

from bench.competitors_swin import monai, window_process
from bench.competitors_windows import SLOW_TO_BUILD, window_field
from florence_fast.ops.window_attention.cases import SUBJECT, Shape, Shape3d, setup

__all__ = [
    "COMPETITORS",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "units",
]

OP = "window_attention"
PLACE = 1
WHAT = "our kernels and their competitors at the paper's stages, windows of 7 to 24"
# The most valuable first: a run may be cut short.
SHAPES = {
    "swin_t_stage1_224": Shape(128, 56, 56, 3),
    "coswin_h_stage3_224": Shape(64, 14, 14, 32),
    "swin_b_stage1_384_window12": Shape(32, 96, 96, 4, window=12, shift=6),
    "coswin_h_stage1_224": Shape(64, 56, 56, 8),
    "swin_t_stage2_224": Shape(128, 28, 28, 6),
    "swin_t_stage3_224": Shape(128, 14, 14, 12),
    "swin_t_stage4_224": Shape(128, 7, 7, 24, shift=0),
    "coswin_h_stage2_224": Shape(64, 28, 28, 16),
    "swin_b_stage3_384_window12": Shape(32, 24, 24, 16, window=12, shift=6),
    "coswin_h_stage3_384": Shape(32, 24, 24, 32),
    "swin_t_stage1_224_unshifted": Shape(128, 56, 56, 3, shift=0),
    "swin_v2_b_stage1_256_window8": Shape(32, 64, 64, 4, window=8, shift=4),
    "swin_v2_b_stage1_256_window16": Shape(32, 64, 64, 4, window=16, shift=8),
    "swin_v2_b_stage1_384_window24": Shape(16, 96, 96, 4, window=24, shift=12),
    "ragged_200x304": Shape(16, 50, 76, 3),
}
REHEARSAL = {
    "tiny_shifted": Shape(1, 14, 14, 1, head_dim=16),
    "tiny_ragged": Shape(1, 7, 9, 1, head_dim=16),
}


# Each token's q, k, v and its result pass through memory once: 3C read and C written. The backward reads qkv and the
# gradient of the result and writes that of qkv: 7C. Table and windows' statistics are under a percent and left out.
def bytes_moved(shape: Shape | Shape3d, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 4, "backward": 7, "both": 11}[mode]
    return shape.batch * math.prod(shape.size) * shape.heads * shape.head_dim * streams * dtype.itemsize


# q k^T and p v, 2 N^2 d each; the backward has a product for each of dp, dv, dq, dk. Recomputing counts for nothing.
def flops(shape: Shape | Shape3d, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 2, "backward": 4, "both": 6}[mode]
    return units(shape) * products * 2 * shape.cut.num_tokens**2 * shape.head_dim


def units(shape: Shape | Shape3d) -> int:
    """Return the number of windows times heads: what the static budget counts its clocks for."""
    return shape.batch * shape.cut.num_windows * shape.heads


def budget_cases(shape: Shape | Shape3d, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    directions = ["forward", "backward"] if mode == "both" else [mode]
    shifted = " shifted" if any(shape.cut.shift) else ""
    sides = "x".join(map(str, shape.window_size))
    return [f"{sides} d{shape.head_dim} {dtype} {direction}{shifted}" for direction in directions]


COMPETITORS = window_field(OP, SUBJECT.rivals, {"monai (sdpa)": monai, "window_process": window_process})
