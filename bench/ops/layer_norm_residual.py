"""Layer norm of a sum, which is returned as well: what stands between the halves of a block.

A stage of its own beside ``layer_norm``: a size there must mean one form to whoever looks a row up by sizes.
"""

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field
from bench.ops import layer_norm
from bench.ops.layer_norm import Shape, flops, units
from florence_fast.ops.cases import Inputs
from florence_fast.ops.layer_norm.cases import draw_layer_norm_residual, plain_layer_norm_residual

__all__ = [
    "COMPETITORS",
    "ENTRY",
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

OP, ENTRY = "layer_norm_residual", "layer_norm"
PLACE = 6
WHAT = "the same of a sum, which is returned too"
SHAPES = {
    "swin_t_stage1_224": Shape(128 * 56 * 56, 96),
    "swin_t_stage4_224": Shape(128 * 7 * 7, 768),
    "coswin_h_stage3_224": Shape(64 * 14 * 14, 1024),
}
REHEARSAL = {"tiny": Shape(33, 40)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw both terms, weight and bias."""
    return draw_layer_norm_residual(shape.rows, shape.channels)(dtype, device, seed)


# Two terms are read, sum and norm written; the backward reads the sum and both gradients and writes one gradient,
# which is that of either term.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 4, "backward": 4, "both": 8}[mode]
    return streams * shape.rows * shape.channels * dtype.itemsize


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    return [f"{case} residual" for case in layer_norm.budget_cases(shape, dtype, mode)]


COMPETITORS = field(ENTRY, lambda inputs: plain_layer_norm_residual)
