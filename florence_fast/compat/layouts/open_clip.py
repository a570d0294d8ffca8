"""open_clip's models, read: the text tower of CLIP, with both spellings, and timm's Swin where that is the image tower.

Another image tower (a ViT, a ResNet) has no counterpart here and is left out.
"""

from __future__ import annotations

import re

from florence_fast.models.layouts import State, to_our_layout, transposed

_TEXT = ("token_embedding.", "positional_embedding", "transformer.resblocks.", "ln_final.", "text_projection")
_TRUNK = "visual.trunk."


def belongs(state: State) -> bool:
    """Say whether these are open_clip's names."""
    return any(re.match(r"(text\.)?transformer\.resblocks\.", name) for name in state)


def read(state: State) -> State:
    """Rename open_clip's tensors to ours; its text projection multiplies from the right and is transposed."""
    renamed = {}
    trunk = {name.removeprefix(_TRUNK): t for name, t in state.items() if name.startswith(_TRUNK)}
    if any(name.endswith("relative_position_bias_table") for name in trunk):
        renamed = {f"visual.{name}": tensor for name, tensor in to_our_layout(trunk).items()}
        if "visual.head.proj.weight" in state:
            renamed["image_projection.weight"] = state["visual.head.proj.weight"]
    for name, tensor in state.items():
        if name.startswith("visual.") or name.endswith("attn_mask"):
            continue
        name = name.removeprefix("text.")
        if name == "text_projection":
            renamed["text_projection.weight"] = transposed(name, tensor)
        elif name.startswith("text_projection."):
            renamed[name] = tensor
        elif name.startswith(_TEXT):
            renamed["text." + name.removeprefix("transformer.")] = tensor
        else:
            renamed[name] = tensor
    return renamed
