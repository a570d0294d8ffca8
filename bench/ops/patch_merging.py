"""Swin's patch merging between the stages of the paper's models, beside the gather, norm and product of its code.

Letters: B batch · H W map height and width · C channels · M merged tokens of the whole batch.
"""

from dataclasses import dataclass

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field
from florence_fast.ops.cases import Inputs
from florence_fast.ops.patch_merging.cases import plain_patch_merging, setup_patch_merging

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

OP = "patch_merging"
PLACE = 4
WHAT = "gather, norm and product in one pass, beside Swin's own code"


@dataclass(frozen=True)
class Shape:
    """A batch of square maps."""

    batch: int
    side: int
    channels: int


SHAPES = {
    "swin_t_merge1_224": Shape(128, 56, 96),
    "swin_t_merge2_224": Shape(128, 28, 192),
    "swin_t_merge3_224": Shape(128, 14, 384),
    "swin_b_merge1_384": Shape(32, 96, 128),
    "width_256": Shape(128, 56, 256),
    "ragged_27": Shape(128, 27, 192),
}
REHEARSAL = {"tiny_ragged": Shape(1, 5, 32)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw maps, norm, weight and gradient."""
    return setup_patch_merging(shape.batch, shape.side, shape.channels)(dtype, device, seed)


# The map is read, the result written, which has half as much. The backward reads the map and the gradient and writes
# the map's. The weight passes once a call: read in each direction, and its gradient written.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    image, merged, weight = shape.batch * shape.side**2, units(shape), 8 * shape.channels**2
    forward = image * shape.channels + merged * 2 * shape.channels + weight
    backward = 2 * image * shape.channels + merged * 2 * shape.channels + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode] * dtype.itemsize


# A product of (M, 4C) and (4C, 2C), and in the backward one for the rows and one for the weight.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    return products * 2 * units(shape) * 8 * shape.channels**2


def units(shape: Shape) -> int:
    """Return the number of merged tokens: what the static budget counts its clocks for."""
    return shape.batch * ((shape.side + 1) // 2) ** 2


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``: the products of the backward are not."""
    return [f"patch_merging C{shape.channels} {dtype} forward"] if mode == "forward" else []


COMPETITORS = field(OP, lambda inputs: plain_patch_merging)
