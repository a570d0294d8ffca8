"""Plain Swin (arXiv 2103.14030): the tower of UniCL's and Microsoft's released weights, under their names.

Equal to Microsoft's and Hugging Face's model at every size: the image is padded with zeros to whole patches, odd maps
with zeros before a merge, and maps that the window does not divide with tokens that hold only the bias of qkv.
With C the width, C_s = C 2**s, n_s blocks and h_s heads in stage s of window w:

    stem    3*4*4*C + C + 2C
    block   12 C_s**2 + 13 C_s + (2w-1)**2 h_s
    merge   8C_s (norm) + 4C_s * 2C_s, after every stage but the last
    norm    2 C_3

With window 7 and without a classifier: tiny 27,519,354 · small 48,837,258 · base 86,743,224 · large 194,995,476.
B batch · H W map height and width · C channels
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.models.layers import is_plain, layer_norm
from florence_fast.models.tower import ImageTower
from florence_fast.ops.windows import has_unknown


class PatchEmbed(nn.Module):
    """A linear map of 4x4 patches, and a LayerNorm."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to (B, ceil(H/4), ceil(W/4), width)."""
        bottom, right = (4 * ((side + 3) // 4) - side for side in image.shape[2:])
        if has_unknown(image.shape) or bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return layer_norm(self.norm, self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours side by side, normalised together, reduced to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C); neighbours in the order (0,0), (1,0), (0,1), (1,1)."""
        if is_plain(self.norm, self.reduction):
            return ops.patch_merging(x, self.norm.weight, self.norm.bias, self.reduction.weight, eps=self.norm.eps)
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        return self.reduction(self.norm(x))


class Swin(ImageTower):
    """The plain Swin Transformer: image (B, 3, H, W) -> pooled features (B, num_features), or logits."""

    pad_mode = "bias"

    @staticmethod
    def make_stem(in_chans: int, width: int) -> nn.Module:
        """Return the stem: 4x4 patches and LayerNorm."""
        return PatchEmbed(in_chans, width)

    @staticmethod
    def make_merge(width: int) -> nn.Module:
        """Return Swin's patch merging."""
        return PatchMerging(width)
