"""CoSwin's convolutional embedding: the stem, and the convolutions between its stages, each with its layer norm.

Letters: k side of the convolution · C channels in · E channels out.
"""

import functools
from dataclasses import dataclass

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field
from florence_fast.ops.cases import Inputs
from florence_fast.ops.conv_embed.cases import plain_conv_embed, setup_convolution

__all__ = [
    "COMPETITORS",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "TUNED",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "units",
]

OP = "conv_embed"
PLACE = 10
WHAT = "CoSwin's stem and the convolutions between its stages"
TUNED = False


@dataclass(frozen=True)
class Shape:
    """A batch of square maps, and a convolution of them."""

    batch: int
    side: int
    channels: int
    width: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1


_STEM = {"kernel": 7, "stride": 4, "padding": 2}
SHAPES = {
    "coswin_h_stem_224": Shape(64, 224, 3, 256, **_STEM),
    "coswin_h_merge1_224": Shape(64, 56, 256, 512),
    "coswin_h_merge2_224": Shape(64, 28, 512, 1024),
    "coswin_h_merge3_224": Shape(64, 14, 1024, 2048),
    "coswin_t_stem_224": Shape(128, 224, 3, 96, **_STEM),
    "coswin_t_merge1_224": Shape(128, 56, 96, 192),
}
REHEARSAL = {"tiny": Shape(1, 9, 16, 32), "tiny_stem": Shape(1, 16, 3, 16, **_STEM)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw maps, convolution, norm and gradient."""
    convolution = {"kernel": shape.kernel, "stride": shape.stride, "padding": shape.padding}
    return setup_convolution(shape.batch, shape.side, shape.channels, shape.width, **convolution)(dtype, device, seed)


# The map is read and the result written; the backward reads the map and the gradient and writes the map's. The weight
# is read in each direction, and its gradient written.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    image, out = shape.batch * shape.side**2 * shape.channels, units(shape) * shape.width
    weight = shape.kernel**2 * shape.channels * shape.width
    forward, backward = image + out + weight, 2 * image + out + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode] * dtype.itemsize


# As a product: rows of k^2 C by k^2 C x E; the backward has one for the map and one for the weight.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the convolution."""
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    return products * 2 * units(shape) * shape.kernel**2 * shape.channels * shape.width


def units(shape: Shape) -> int:
    """Return the number of tokens that come out."""
    return shape.batch * shape.out_side**2


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return nothing: the convolution is a library's, and the static budget has no case with it."""
    return []


COMPETITORS = field(OP, lambda inputs: functools.partial(plain_conv_embed, **inputs.options))
