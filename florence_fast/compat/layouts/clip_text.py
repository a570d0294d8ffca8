"""CLIP's text tower in Hugging Face's names (CLIPTextModel, CLIPTextModelWithProjection, CLIPModel), read.

Its three products of an attention join into one. The images' side of a CLIPModel is no Swin and is left out.
"""

from __future__ import annotations

import re

from florence_fast.models.layouts import State, join

_EMBEDDING = "embeddings.token_embedding.weight"
_NAMES = [
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^encoder\.layers\.", "resblocks."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
]
_OURS = ("token_embedding.", "positional_embedding", "resblocks.", "ln_final.")


def belongs(state: State) -> bool:
    """Say whether these are the names of a CLIP text tower in transformers."""
    return _EMBEDDING in state or f"text_model.{_EMBEDDING}" in state


def read(state: State) -> State:
    """Rename a text tower to ours, under ``text.``; its projection is ``text_projection.weight`` on both sides."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(("vision_model.", "visual_projection.")) or name.endswith("position_ids"):
            continue
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        renamed[f"text.{name}" if name.startswith(_OURS) else name] = tensor
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        block, kind = name.split(".self_attn.q_proj.")
        join(renamed, [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"], f"{block}.attn.in_proj_{kind}")
    return renamed
