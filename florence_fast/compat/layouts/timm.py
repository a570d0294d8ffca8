"""timm's Swin, written as timm has had it since 2023: a merge at the head of the stage that it leads to.

Read are both of timm's generations, in `florence_fast.models.layouts`. timm computes masks and indices itself.
"""

from __future__ import annotations

import re

from florence_fast.compat.layouts.microsoft import stage_side
from florence_fast.models.config import ImageConfig
from florence_fast.models.layouts import State


def write(state: State, config: ImageConfig) -> State:
    """Give the tensors of a plain Swin under timm's names.

    Raises:
        ValueError: a map is smaller than the window, where timm's table would be smaller too.
    """
    last = stage_side(config, len(config.depths) - 1)
    if last < config.window_size:
        raise ValueError(
            f"timm shrinks windows to the map: at image size {config.img_size} the last stage has {last} x {last}, "
            f"less than the window {config.window_size}; give another image size or window"
        )
    written = {}
    for name, tensor in state.items():
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        written[re.sub(r"^head\.", "head.fc.", name)] = tensor
    return written
