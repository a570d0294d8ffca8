"""What makes a map coarser: Swin's patch merging and CvT's convolution, each with its layer norm.

Letters: B batch · H W map height and width · C channels.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.verify.cases import Case, Function, Inputs, Subject, generator

Make = Callable[[torch.dtype, str, int], Inputs]


def setup_patch_merging(batch: int, side: int, channels: int) -> Make:
    """Return ``make(dtype, device, seed)``: a square map, odd or even, and Swin's merging of it."""

    def make(dtype: torch.dtype, device: str, seed: int) -> Inputs:
        draw, wide = generator(device, seed), torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device, dtype=wide)

        tensors = {
            "x": (0.5 + normal(batch, side, side, channels)).to(dtype),
            "norm_weight": 1 + normal(4 * channels) / 4,
            "norm_bias": normal(4 * channels) / 4,
            "weight": (normal(2 * channels, 4 * channels) / (4 * channels) ** 0.5).to(dtype),
        }
        merged = (side + 1) // 2
        return Inputs(tensors, {}, normal(batch, merged, merged, 2 * channels).to(dtype))

    return make


def plain_patch_merging(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    """Gather, normalise, multiply, as Swin's code does."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype)), weight)


def setup_conv_embed(batch: int, side: int, channels: int) -> Make:
    """Return ``make(dtype, device, seed)``: a square map and a 3x3 convolution of stride 2 to twice the channels."""
    return setup_convolution(batch, side, channels, 2 * channels, kernel=3, stride=2, padding=1)


def setup_convolution(
    batch: int, side: int, channels: int, width: int, *, kernel: int, stride: int, padding: int
) -> Make:
    """Return ``make(dtype, device, seed)``: a square map and a convolution to ``width`` channels."""

    def make(dtype: torch.dtype, device: str, seed: int) -> Inputs:
        draw, wide = generator(device, seed), torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device, dtype=wide).to(dtype)

        tensors = {
            "x": normal(batch, side, side, channels),
            "weight": normal(width, channels, kernel, kernel) / (kernel * kernel * channels) ** 0.5,
            "bias": normal(width),
            "norm_weight": 1 + normal(width) / 4,
            "norm_bias": normal(width) / 4,
        }
        coarse = (side + 2 * padding - kernel) // stride + 1
        return Inputs(tensors, {"stride": stride, "padding": padding}, normal(batch, coarse, coarse, width))

    return make


def plain_conv_embed(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, *, stride: int, padding: int
) -> Tensor:
    """Convolve and normalise in the dtype of ``x``."""
    x = F.conv2d(x.movedim(-1, 1), weight, bias, stride, padding).movedim(1, -1)
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)


def _subject(op: str, setup: Callable[[int, int, int], Make], plain: Function) -> Subject:
    return Subject(
        op=op,
        checked=(Case("14x14, C=32", setup(2, 14, 32)), Case("9x9, C=48", setup(1, 9, 48))),
        timed={"cpu": Case("56x56, C=96", setup(2, 56, 96)), "cuda": Case("128 of 56x56, C=96", setup(128, 56, 96))},
        rivals={"eager": lambda inputs: functools.partial(plain, **inputs.options)},
    )


SUBJECTS = (
    _subject("patch_merging", setup_patch_merging, plain_patch_merging),
    _subject("conv_embed", setup_conv_embed, plain_conv_embed),
)
