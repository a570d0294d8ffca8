"""CoSwin, Florence's image tower (arXiv 2111.11432, section 2.3): Swin between the convolutional embeddings of CvT.

The stem is Conv 7x7, stride 4, padding 2 with a bias, then LayerNorm; a merge is Conv 3x3, stride 2, padding 1 without
a bias (as Swin's reduction has none), then LayerNorm. The paper gives no widths: FLORENCE's five published figures fix
them together. With C the width, C_s = C 2**s, n_s blocks and h_s heads in stage s of window w = 7:

    stem    3*7*7*C + C + 2C
    block   3C_s**2 + 3C_s (qkv) + C_s**2 + C_s (proj) + 8C_s**2 + 5C_s (mlp) + 4C_s (norms) + 169 h_s (bias table)
          = 12 C_s**2 + 13 C_s + 169 h_s
    merge   9 C_s * 2C_s + 4C_s, after every stage but the last
    norm    2 C_3

tiny 29,461,530 · small 50,779,434 · base 90,192,952 · large 202,750,548 · huge 637,368,368; a classifier of K classes
adds K (C_3 + 1). The paper says 637M of CoSwin-H.
B batch · H W map height and width · C channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.models.layers import is_plain
from florence_fast.models.tower import ImageTower


class ConvEmbed(nn.Module):
    """A strided convolution and a LayerNorm on channels-last maps (CvT, arXiv 2103.15808, section 3.2)."""

    def __init__(self, in_width: int, width: int, *, kernel: int, stride: int, padding: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_width, width, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C')."""
        if is_plain(self.proj, self.norm):
            options = {"stride": self.proj.stride, "padding": self.proj.padding, "eps": self.norm.eps}
            return ops.conv_embed(x, self.proj.weight, self.proj.bias, self.norm.weight, self.norm.bias, **options)
        # The permuted view of a channels-last map is what convolutions call channels_last memory: nothing is copied.
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvStem(ConvEmbed):
    """The embedding of the image itself, four pixels a step."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__(in_chans, width, kernel=7, stride=4, padding=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to (B, H/4, W/4, width)."""
        return super().forward(x.permute(0, 2, 3, 1))


class CoSwin(ImageTower):
    """Florence's image tower: image (B, 3, H, W) -> pooled features (B, num_features), or logits."""

    pad_mode = "mask"

    @staticmethod
    def make_stem(in_chans: int, width: int) -> nn.Module:
        """Return the stem: Conv 7x7, stride 4, and LayerNorm."""
        return ConvStem(in_chans, width)

    @staticmethod
    def make_merge(width: int) -> nn.Module:
        """Return the merge: Conv 3x3, stride 2, and LayerNorm."""
        return ConvEmbed(width, 2 * width, kernel=3, stride=2, padding=1, bias=False)
