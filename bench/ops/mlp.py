"""The perceptron of a block on the maps of the paper's models: two products with a bias and a GELU between them.

Letters: R rows · C channels · F hidden width, 4 C.
"""

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field
from bench.ops.layer_norm import Shape, units
from florence_fast.ops.cases import Inputs
from florence_fast.ops.mlp.cases import draw_mlp, plain_mlp

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

OP = "mlp"
PLACE = 7
WHAT = "two products with bias and GELU between them"
SHAPES = {
    "swin_t_stage1_224": Shape(128 * 56 * 56, 96),
    "swin_t_stage3_224": Shape(128 * 14 * 14, 384),
    "coswin_h_stage3_224": Shape(64 * 14 * 14, 1024),
    "coswin_h_stage1_224": Shape(64 * 56 * 56, 256),
}
REHEARSAL = {"tiny": Shape(40, 16)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw rows, both layers and the gradient."""
    return draw_mlp(shape.rows, shape.channels)(dtype, device, seed)


# x is read and the result written; the backward reads x and the gradient and writes that of x. Both weights are read
# in each direction, and their gradients written. The hidden activation need not leave the multiprocessors.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    rows, weights = shape.rows * shape.channels, 8 * shape.channels**2
    forward, backward = 2 * rows + weights, 3 * rows + 2 * weights
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode] * dtype.itemsize


# Two products of R x C x F; the backward has two for each. Recomputing the hidden activation counts for nothing.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 2, "backward": 4, "both": 6}[mode]
    return products * 2 * shape.rows * 4 * shape.channels**2


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return nothing: the products are a library's, and the static budget has the activation between them alone."""
    return []


COMPETITORS = field(OP, lambda inputs: plain_mlp)
