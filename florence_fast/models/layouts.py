"""Recognise which library's names a checkpoint uses, and map them to ours.

Read: our own files, Microsoft's Swin and UniCL (with both of UniCL's older spellings), timm's Swin of either
generation, Hugging Face's Swin of either generation. Our parameters carry Microsoft's names, so that most of this
file is about prefixes. A layout is a test and a renaming, both on plain dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
_DEPTH = 8
# what DDP and others put before every name, and what wrappers of single modules put inside names
_PREFIXES = ("module.", "model.", "_forward_module.", "_model.")
_INSIDE_NAMES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BUFFERS = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")


def unwrap(loaded: Mapping[Any, Any]) -> State:
    """Find the state inside what a training script saved, and take the prefixes of wrappers off its names.

    Wrappers are DistributedDataParallel, torch.compile, FSDP, activation checkpointing, DeepSpeed, AveragedModel, and
    the attribute ``model`` or ``module`` of a trainer, in any order and number.

    Raises:
        ValueError: there is no dictionary of plain tensors inside, or two names become one.
    """
    for _ in range(_DEPTH):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    else:
        raise ValueError(f"dictionaries are nested more than {_DEPTH} deep under the keys {', '.join(_WRAPPERS)}")
    state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"no tensors found under the keys {sorted(map(str, loaded))[:8]}")
    for name, value in state.items():
        _refuse_strange(name, value)
    return _without_prefixes({name: value for name, value in state.items() if name != "n_averaged"})


def _refuse_strange(name: object, value: Tensor) -> None:
    """Refuse what is no dense tensor on the CPU under a name."""
    if not isinstance(name, str):
        raise ValueError(f"tensors must have names, got the key {name!r}")
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        kind = "nested" if value.is_nested else "quantised" if value.is_quantized else value.layout
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one")
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be a tensor with values, got one on the device {value.device}")


def _without_prefixes(state: State) -> State:
    names = {name: _INSIDE_NAMES.sub("", name) for name in state}
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    shortened = {names[name]: value for name, value in state.items()}
    if len(shortened) < len(state):
        twice = next(name for name in shortened if list(names.values()).count(name) > 1)
        raise ValueError(f"two tensors are called {twice!r} once the prefixes of wrappers are taken off")
    return shortened


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


def join(state: State, parts: Sequence[str], name: str) -> None:
    """Replace the tensors ``parts`` by one, ``name``, their rows one below the other; ``state`` is changed.

    Raises:
        ValueError: a part is missing, or their shapes do not fit.
    """
    for part in parts:
        if part not in state:
            raise ValueError(f"{name} is read from {', '.join(parts)}, and {part} is missing")
    tensors = [state.pop(part) for part in parts]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if () in shapes or len({shape[1:] for shape in shapes}) > 1 or len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"{', '.join(parts)} must have rows of one length and dtype, got the shapes {shapes}")
    state[name] = torch.cat(tensors)


def transposed(name: str, value: Tensor) -> Tensor:
    """Transpose a matrix, whose name is for the message.

    Raises:
        ValueError: it is none.
    """
    if value.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got the shape {tuple(value.shape)}")
    return value.T.contiguous()


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
            renamed[_UNICL_PROJECTIONS[name]] = transposed(name, value)
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
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        join(renamed, parts, name.replace(".attn.q.", ".attn.qkv."))
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
