"""torchvision's ``swin_t``, ``swin_s`` and ``swin_b``, read and written: one list of features, odd ones the stages.

torchvision drops the shift of each axis alone where ours drops both, so that a map with one short side is cut
otherwise there; square images give equal features.
"""

from __future__ import annotations

import re

from florence_fast.compat.layouts.microsoft import relative_position_index
from florence_fast.models.config import ImageConfig
from florence_fast.models.layouts import State

_BLOCK = re.compile(r"^features\.(\d+)\.(\d+)\.(.+)$")
_MERGE = re.compile(r"^features\.(\d+)\.((?:reduction|norm)\..+)$")
_STEM = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm."}
_LINEARS = {"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}


def belongs(state: State) -> bool:
    """Say whether these are torchvision's names."""
    return "features.0.0.weight" in state and any(name.endswith("relative_position_bias_table") for name in state)


def read(state: State) -> State:
    """Rename torchvision's tensors to ours."""
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    for theirs, ours in _STEM.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if match := _MERGE.match(name):
        return f"layers.{int(match[1]) // 2 - 1}.downsample.{match[2]}"
    if match := _BLOCK.match(name):
        rest = match[3]
        for theirs, ours in _LINEARS.items():
            rest = ours + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
        return f"layers.{(int(match[1]) - 1) // 2}.blocks.{match[2]}.{rest}"
    return name


def write(state: State, config: ImageConfig) -> State:
    """Give the tensors of a plain Swin under torchvision's names, with the indices that its model wants."""
    written = {}
    for name, tensor in state.items():
        for theirs, ours in _STEM.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        for theirs, ours in _LINEARS.items():
            name = name.replace(f".{ours}", f".{theirs}")
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}.", name)
        name = re.sub(r"^layers\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", name)
        written[name] = tensor
        if name.endswith("relative_position_bias_table"):
            index = relative_position_index(config.window_size).flatten()
            written[name.replace("bias_table", "index")] = index
    return written
