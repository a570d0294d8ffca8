"""Division of features by their length, as both towers end.

Letters: R rows · C channels.
"""

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field
from bench.ops.layer_norm import Shape, bytes_moved, flops, units
from florence_fast.ops.cases import Inputs
from florence_fast.ops.l2_normalize.cases import draw_l2_normalize, plain_l2_normalize

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

OP = "l2_normalize"
PLACE = 12
WHAT = "features divided by their length"
SHAPES = {
    "batch_24k_d512": Shape(24576, 512),
    "batch_24k_d1024": Shape(24576, 1024),
    "batch_1m_d512": Shape(1 << 20, 512),
}
REHEARSAL = {"tiny": Shape(33, 40)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw rows and the gradient."""
    return draw_l2_normalize(shape.rows, shape.channels)(dtype, device, seed)


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    directions = ["forward", "backward"] if mode == "both" else [mode]
    return [f"l2_normalize C{shape.channels} {dtype} {direction}" for direction in directions]


COMPETITORS = field(OP, lambda inputs: plain_l2_normalize)
