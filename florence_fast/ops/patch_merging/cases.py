"""Swin's patch merging as its own code does it, and the sizes that verification takes.

Letters: B batch · H W map height and width · C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Inputs, Make, generator, map_subject


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


SUBJECTS = {"patch_merging": map_subject("patch_merging", setup_patch_merging, plain_patch_merging, autocast=("x",))}
