"""Microsoft's Swin files, written: their names are ours, and beside the parameters stand two buffers a block.

Their model refuses a file without the buffers, so that they are computed here: which row of the bias table each pair
of tokens reads, and which pairs the shifted windows keep apart.

N tokens of one window · M windows of one map
"""

from __future__ import annotations

import torch
from torch import Tensor

from florence_fast.models.config import ImageConfig
from florence_fast.models.layouts import State

_APART = -100.0


def write(state: State, config: ImageConfig) -> State:
    """Give the tensors of a plain Swin under Microsoft's names, buffers included.

    Raises:
        ValueError: their model of this image size would have other windows, or none at all.
    """
    written = dict(state)
    for stage, depth in enumerate(config.depths):
        side = stage_side(config, stage)
        if side % config.window_size:
            raise ValueError(
                f"Microsoft's Swin needs windows of {config.window_size} that divide the map of each stage: at "
                f"image size {config.img_size} stage {stage} has {side} x {side}; give another image size or window"
            )
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            written[f"{name}.attn.relative_position_index"] = relative_position_index(config.window_size)
            if block % 2 and side > config.window_size:
                written[f"{name}.attn_mask"] = attention_mask(side, config.window_size)
    return written


def stage_side(config: ImageConfig, stage: int) -> int:
    """Return the height and width of the maps of ``stage``."""
    side = -(-config.img_size // 4)
    for _ in range(stage):
        side = -(-side // 2)
    return side


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table that each pair of tokens reads, (N, N) int64."""
    rows, columns = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    down, right = (x[:, None] - x[None, :] + window - 1 for x in (rows, columns))
    return down * (2 * window - 1) + right


def attention_mask(side: int, window: int) -> Tensor:
    """Return what is added to the scores of a shifted map, (M, N, N): nothing within a region, -100 across regions."""
    place = torch.arange(side)
    strip = (place >= side - window).long() + (place >= side - window // 2).long()
    region = strip[:, None] * 3 + strip[None, :]  # (side, side)
    tiles = region.unflatten(1, (-1, window)).unflatten(0, (-1, window))  # (rows, window, columns, window)
    tokens = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # (M, N)
    return torch.where(tokens[:, :, None] == tokens[:, None, :], 0.0, _APART)
