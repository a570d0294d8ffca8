"""A convolution and a layer norm by PyTorch, and the sizes that verification takes.

Letters: B batch · H W map height and width · C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Inputs, Make, generator, map_subject


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


SUBJECTS = {
    "conv_embed": map_subject(
        "conv_embed",
        setup_conv_embed,
        plain_conv_embed,
        Case("no bias", setup_conv_embed(2, 5, 16)).given("no bias", bias=None),
    )
}
