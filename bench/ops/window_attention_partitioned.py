"""Attention in windows that are cut out already, as models call it that partition themselves.

Letters: N tokens in one window · h heads · d head dim.
"""

from dataclasses import dataclass

import torch

from bench.competitors_windows import SLOW_TO_BUILD, window_field
from florence_fast.ops.cases import Inputs
from florence_fast.ops.window_attention_partitioned import cases
from florence_fast.ops.window_attention_partitioned.cases import SUBJECT

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

OP = "window_attention_partitioned"
PLACE = 9
WHAT = "attention in windows that are cut out already"


@dataclass(frozen=True)
class Shape:
    """All windows of a batch, of which as many as there are masks make one map."""

    windows: int
    masks: int
    heads: int
    tokens: int = 49
    head_dim: int = 32


SHAPES = {
    "swin_t_stage1_224": Shape(128 * 64, 64, 3),
    "swin_t_stage3_224": Shape(128 * 4, 4, 12),
    "swin_b_stage1_384_window12": Shape(32 * 64, 64, 4, tokens=144),
    "swin_v2_b_stage1_256_window16": Shape(32 * 16, 16, 4, tokens=256),
}
REHEARSAL = {"tiny": Shape(4, 2, 1, tokens=9, head_dim=16)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw q, k, v, the bias, a mask as a shift gives it, and the gradient."""
    sizes = (shape.windows, shape.masks, shape.heads, shape.tokens, shape.head_dim)
    return cases.setup(*sizes, dtype, device, seed)


# q, k and v are read and the result written; the backward reads them and the gradient and writes three. Bias and mask
# have the size of one map's scores and come out of the cache.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 4, "backward": 7, "both": 11}[mode]
    return streams * units(shape) * shape.tokens * shape.head_dim * dtype.itemsize


# q k^T and p v, 2 N^2 d each; the backward has a product for each of dp, dv, dq, dk. Recomputing counts for nothing.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 2, "backward": 4, "both": 6}[mode]
    return units(shape) * products * 2 * shape.tokens**2 * shape.head_dim


def units(shape: Shape) -> int:
    """Return the number of windows times heads: what the static budget counts its clocks for."""
    return shape.windows * shape.heads


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    directions = ["forward", "backward"] if mode == "both" else [mode]
    return [f"partitioned N{shape.tokens} d{shape.head_dim} {dtype} {direction}" for direction in directions]


COMPETITORS = window_field(OP, SUBJECT.rivals)
