"""Swin as Microsoft lays it out, written anew: blocks and merges for classification and for detection."""

import torch
import torch.nn.functional as F
from torch import nn

WINDOW = 4


class Attention(nn.Module):
    """Attention among the tokens of windows (B * M, N, C), M of which have a mask each."""

    def __init__(self, width, num_heads, drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, num_heads))
        place = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + WINDOW - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * WINDOW - 1) + offset[1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(drop), nn.Dropout(0.0), nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q * self.scale @ k.mT + self.relative_position_bias_table[self.relative_position_index].permute(
            2, 0, 1
        )
        if mask is not None:
            logits = logits + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        out = self.attn_drop(self.softmax(logits)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * (x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep) / keep)


def to_windows(x):
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
    return x.flatten(0, 2).flatten(1, 2)


def from_windows(x, height, width):
    x = x.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, x.shape[-1])
    return x.transpose(2, 3).reshape(len(x), height, width, -1)


def make_mask(height, width, shift):
    region = torch.zeros(1, height, width, 1)
    for i, rows in enumerate((slice(-WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(-WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
            region[:, rows, columns] = 3 * i + j
    region = to_windows(region).squeeze(-1)
    return (region[:, None, :] != region[:, :, None]) * -100.0


class Base(nn.Module):
    def __init__(self, width, num_heads, shift_size, drop_path=0.0, attn_drop=0.0):
        super().__init__()
        self.window_size, self.shift_size = WINDOW, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, num_heads, attn_drop), Mlp(width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def compute(self, x, height, width, mask):
        shortcut, shift = x, self.shift_size
        x = self.norm1(x).unflatten(1, (height, width))
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        padded = x.shape[1:3]
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = from_windows(self.attn(to_windows(x), mask if shift else None), *padded)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        x = x[:, :height, :width].flatten(1, 2)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassifierBlock(Base):
    """The block for classification, which knows its map and its mask."""

    def __init__(self, *args, resolution=(8, 12), **kwargs):
        super().__init__(*args, **kwargs)
        self.input_resolution = resolution
        self.register_buffer("attn_mask", make_mask(*resolution, self.shift_size) if self.shift_size else None)

    def forward(self, x):
        assert x.shape[1] == self.input_resolution[0] * self.input_resolution[1], "input feature has wrong size"
        return self.compute(x, *self.input_resolution, self.attn_mask)


class DetectorBlock(Base):
    """The block for detection, whose stage says what the map is."""

    H = W = None

    def forward(self, x, mask_matrix):
        return self.compute(x, self.H, self.W, mask_matrix)


class Stage(nn.Module):
    """Blocks of a kind, plain and shifted."""

    def __init__(self, kind, size, **kwargs):
        super().__init__()
        self.size = size
        if kind is ClassifierBlock:
            kwargs["resolution"] = size
        self.blocks = nn.ModuleList([kind(24, 2, shift, **kwargs) for shift in (0, WINDOW // 2)])

    def forward(self, x):
        height, width = self.size
        for block in self.blocks:
            if isinstance(block, ClassifierBlock):
                x = block(x)
            else:
                block.H, block.W = self.size
                x = block(x, make_mask(height + -height % WINDOW, width + -width % WINDOW, WINDOW // 2))
        return x


class Merge(nn.Module):
    """Four tokens side by side, normed and reduced."""

    def __init__(self, width, resolution=None, norm_width=4):
        super().__init__()
        if resolution is not None:
            self.input_resolution = resolution
        self.norm, self.reduction = nn.LayerNorm(norm_width * width), nn.Linear(4 * width, 2 * width, bias=False)

    def merge(self, x, height, width):
        x = x.unflatten(1, (height, width))
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = self.side_by_side(x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]).flatten(1, 2)
        first, second = (
            (self.norm, self.reduction) if self.norm.weight.shape[0] == x.shape[-1] else (self.reduction, self.norm)
        )
        return second(first(x))

    def side_by_side(self, *corners):
        return torch.cat(corners, -1)


class ClassifierMerge(Merge):
    """The merge for classification, which knows its map."""

    def forward(self, x):
        height, width = self.input_resolution
        assert x.shape[1] == height * width and height % 2 == width % 2 == 0, "input feature has wrong size"
        return self.merge(x, height, width)


class DetectorMerge(Merge):
    """The merge for detection, which is told the map."""

    def forward(self, x, H, W):
        return self.merge(x, H, W)


class WholeClassifier(nn.Module):
    """A stage and the merge behind it."""

    def __init__(self, size):
        super().__init__()
        self.first, self.merge = Stage(ClassifierBlock, size), ClassifierMerge(24, size)

    def forward(self, x):
        return self.merge(self.first(x))


CASES = {
    "classifier": (ClassifierBlock, (8, 12)),
    "detector-exact": (DetectorBlock, (8, 12)),
    "detector-ragged": (DetectorBlock, (9, 14)),
    "detector-small": (DetectorBlock, (3, 9)),
}


def tokens(size, batch=2):
    return torch.randn(batch, size[0] * size[1], 24)
