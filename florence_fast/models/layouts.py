"""Whose names a checkpoint uses, and what they are called here.

Read: our own files, Microsoft's Swin and UniCL (with both of UniCL's older spellings), timm's Swin of either
generation, Hugging Face's Swin of either generation. Our parameters carry Microsoft's names, so that most of this
file is about prefixes. A layout is a test and a renaming, both on plain dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
_BUFFERS = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")


def unwrap(loaded: Mapping[str, Any]) -> State:
    """Find the state inside what a training script saved, and take the prefixes of DDP and compile off its names.

    Raises:
        ValueError: there is no dictionary of tensors inside.
    """
    for key in _WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            return unwrap(loaded[key])
    state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"no tensors found under the keys {sorted(map(str, loaded))[:8]}")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def to_our_layout(state: State) -> State:
    """Rename the tensors of any layout that this file knows; names of our own pass through.

    Buffers that older code saved, relative position indices and attention masks, are left out: here they are
    arithmetic.
    """
    state = drop_buffers(state)
    for belongs, rename in _LAYOUTS:
        if belongs(state):
            return rename(state)
    return state


def drop_buffers(state: State) -> State:
    """Leave out relative position indices and attention masks."""
    return {name: value for name, value in state.items() if not _BUFFERS.search(name)}


_UNICL_PREFIXES = {"image_encoder.": "visual.", "text_encoder.": "text.", "lang_encoder.": "text."}
_UNICL_PROJECTIONS = {
    "image_projection": "image_projection.weight",
    "vision_projection": "image_projection.weight",
    "text_projection": "text_projection.weight",
    "lang_projection": "text_projection.weight",
}


def is_unicl(state: State) -> bool:
    """Say whether these are UniCL's names, in any of their spellings."""
    return any(name in state for name in _UNICL_PROJECTIONS)


def _from_unicl(state: State) -> State:
    """UniCL's towers by prefix; its projections multiply from the right, so that they are transposed here."""
    renamed = {}
    for name, value in state.items():
        if name in _UNICL_PROJECTIONS:
            renamed[_UNICL_PROJECTIONS[name]] = value.T.contiguous()
            continue
        for prefix, ours in _UNICL_PREFIXES.items():
            if name.startswith(prefix):
                name = ours + name.removeprefix(prefix)
        renamed[name] = value
    return renamed


def is_hugging_face_swin(state: State) -> bool:
    """Say whether these are the names of a Swin in transformers."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state)


_HUGGING_FACE_NAMES = [
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (
        r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$",
        ".attn.relative_position_bias_table",
    ),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]


def _from_hugging_face_swin(state: State) -> State:
    """Hugging Face's names, of 2021 and of 2026; query, key and value join into one product."""
    renamed = {}
    for name, value in state.items():
        for pattern, ours in _HUGGING_FACE_NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return renamed


def _is_new_timm_swin(state: State) -> bool:
    return "layers.1.downsample.reduction.weight" in state and "layers.0.downsample.reduction.weight" not in state


def _from_new_timm_swin(state: State) -> State:
    """timm since 2023: a merge stands at the head of the stage it leads to, the classifier inside ``head.fc``."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
        renamed[re.sub(r"^head\.fc\.", "head.", name)] = value
    return renamed


_LAYOUTS: list[tuple[Callable[[State], bool], Callable[[State], State]]] = [
    (is_unicl, _from_unicl),
    (is_hugging_face_swin, _from_hugging_face_swin),
    (_is_new_timm_swin, _from_new_timm_swin),
]
