"""Deformable convolution by four gathers and a product, and the sizes that verification takes.

Letters: B batch · H W map height and width · C channels.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Function, Inputs, Subject, generator


def setup(batch: int, height: int, width: int, channels: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw a map, offsets of about two pixels, a mask, and a 3x3 convolution as Dynamic Head has it."""
    draw = generator(device, seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=wide)

    places = (batch, 9, height, width)
    tensors = {
        "input": normal(batch, channels, height, width),
        "offset": 2 * normal(batch, 18, height, width),
        "mask": torch.rand(*places, generator=draw, device=device, dtype=wide),
        "weight": normal(channels, channels, 3, 3) / (9 * channels) ** 0.5,
        "bias": normal(channels),
    }
    grad_out = normal(batch, channels, height, width).to(dtype)
    return Inputs({name: x.to(dtype) for name, x in tensors.items()}, {"padding": 1}, grad_out)


def strided_setup(dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Draw a map for a 3x2 convolution of two groups with two groups of offsets, each side with sizes of its own."""
    draw = generator(device, seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=wide).to(dtype)

    tensors = {"input": normal(2, 8, 9, 8), "offset": normal(2, 24, 5, 5), "weight": normal(6, 4, 3, 2) / 24**0.5}
    options = {"stride": (2, 1), "padding": (2, 0), "dilation": (2, 3)}
    return Inputs(tensors, options, normal(2, 6, 5, 5))


def eager(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *, padding: int) -> Tensor:
    """Gather four pixels of every sample from a map with a border of zeros, weigh them, multiply."""
    (_, _, height, width), (kh, kw) = input.shape, weight.shape[2:]
    wide = torch.promote_types(offset.dtype, torch.float32)
    places, taps = ([torch.arange(n, device=input.device, dtype=wide) for n in s] for s in ((height, width), (kh, kw)))
    moved = offset.to(wide).unflatten(1, (kh, kw, 2)) - padding
    y = (moved[:, :, :, 0] + taps[0][:, None, None, None] + places[0][:, None]).clamp(-1, height) + 1
    x = (moved[:, :, :, 1] + taps[1][:, None, None] + places[1]).clamp(-1, width) + 1
    y0, x0 = y.detach().floor(), x.detach().floor()
    fy, fx = ((p - p0).to(input.dtype)[:, None] for p, p0 in ((y, y0), (x, x0)))
    flat = F.pad(input, (1, 2, 1, 2)).flatten(2)

    def pixel(down: int, right: int) -> Tensor:
        index = ((y0 + down) * (width + 3) + x0 + right).long().flatten(1)
        return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).unflatten(2, y.shape[1:])

    upper, lower = (pixel(down, 0) * (1 - fx) + pixel(down, 1) * fx for down in (0, 1))
    samples = (upper * (1 - fy) + lower * fy) * mask.unflatten(1, (1, kh, kw))
    out = weight.flatten(1) @ samples.flatten(1, 3).flatten(2)
    return out.unflatten(2, (height, width)) + bias[:, None, None]


def _eager(inputs: Inputs) -> Function:
    return functools.partial(eager, **inputs.options)


def _case(name: str, *shape: int) -> Case:
    return Case(name, functools.partial(setup, *shape))


SUBJECT = Subject(
    op="deform_conv2d",
    checked=(_case("3x3, 64 channels", 2, 17, 23, 64), _case("3x3, 256 channels", 1, 13, 21, 256)),
    timed={
        "cpu": _case("Dynamic Head level 5, 2 images", 2, 25, 38, 256),
        "cuda": _case("Dynamic Head level 3, 8 images", 8, 100, 152, 256),
    },
    rivals={"eager": _eager},
    small=(
        _case("3x3", 2, 4, 5, 16),
        _case("3x3", 2, 4, 5, 16).given("no mask, no bias", mask=None, bias=None),
        Case("strided", strided_setup),
    ),
    empty=_case("no maps", 0, 4, 5, 16),
    autocast=("input", "weight", "bias"),
)
SUBJECTS = {"deform_conv2d": SUBJECT}
