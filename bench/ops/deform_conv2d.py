"""Modulated deformable convolution on the levels of a feature pyramid, as Dynamic Head calls it.

Letters: B batch · H W map height and width · C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field, found
from bench.session import Built, Plan
from florence_fast.ops.cases import Inputs
from florence_fast.ops.deform_conv2d import cases
from florence_fast.ops.deform_conv2d.cases import SUBJECT

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

OP = "deform_conv2d"
PLACE = 13
WHAT = "the levels of Dynamic Head, beside torchvision"


@dataclass(frozen=True)
class Shape:
    """A batch of maps and a 3x3 convolution that keeps their size and width."""

    batch: int
    height: int
    width: int
    channels: int = 256


# Levels 3 to 7 of images of 800 x 1216; what the widest level needs decides how fast a head is.
SHAPES = {
    "dynamic_head_level3": Shape(8, 100, 152),
    "dynamic_head_level4": Shape(8, 50, 76),
    "dynamic_head_level5": Shape(8, 25, 38),
    "dynamic_head_level7": Shape(8, 7, 10),
}
REHEARSAL = {"tiny": Shape(1, 4, 5, 16)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw maps, offsets, a mask, the convolution and the gradient."""
    return cases.setup(*(shape.batch, shape.height, shape.width, shape.channels), dtype, device, seed)


# A pixel has C channels, 18 offsets and 9 factors; they are read and C channels written. The backward reads them and
# the gradient and writes those of all. The weight is read in each direction, and its gradient written.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    pixels, places, weight = shape.batch * shape.height * shape.width, 27, 9 * shape.channels**2
    forward = pixels * (2 * shape.channels + places) + weight
    backward = pixels * (3 * shape.channels + 2 * places) + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode] * dtype.itemsize


# A product of 9 C by C for each pixel, and in the backward one for the samples and one for the weight; to gather
# counts for nothing.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    return products * 2 * units(shape) * shape.channels**2


def units(shape: Shape) -> int:
    """Return the number of samples, nine a pixel: what the static budget counts its clocks for."""
    return 9 * shape.batch * shape.height * shape.width


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return nothing: the products are a library's, and the static budget has the gathering alone."""
    return []


def torchvision(inputs: Inputs, plan: Plan) -> Built:
    """Call torchvision's, whose arguments ours are."""
    function = found("torchvision", "ops.deform_conv2d")

    def run(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(input, offset, weight, bias, mask=mask, **inputs.options)

    return Built(run)


COMPETITORS = field(OP, SUBJECT.rivals["eager"], {"torchvision": torchvision})
