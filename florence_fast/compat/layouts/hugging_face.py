"""Hugging Face's Swin, written under the names of the published files, and its ``config.json`` both ways.

Read are its names of 2021 and of 2026, in `florence_fast.models.layouts`. transformers of either generation loads what
is written here: 5.x renames the published names itself.
"""

from __future__ import annotations

import re
from typing import Any

from florence_fast.models.config import ImageConfig
from florence_fast.models.layouts import State

_NAMES = [
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative_position_bias_table$", ".attention.self.relative_position_bias_table"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
_PARTS = ("query", "key", "value")


def write(state: State, config: ImageConfig) -> State:
    """Give the tensors of a plain Swin under Hugging Face's names; qkv is cut into query, key and value."""
    written = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            written["classifier." + name.removeprefix("head.")] = tensor
            continue
        for pattern, theirs in _NAMES:
            name = re.sub(pattern, theirs, name)
        if ".attn.qkv." in name:
            for part, piece in zip(_PARTS, tensor.chunk(3), strict=True):
                written["swin." + name.replace(".attn.qkv.", f".attention.self.{part}.")] = piece.contiguous()
            continue
        written[f"swin.{name}"] = tensor
    return written


def config_json(config: ImageConfig) -> dict[str, Any]:
    """Return the ``config.json`` with which transformers builds the same model."""
    values = {
        "architectures": ["SwinForImageClassification" if config.num_classes else "SwinModel"],
        "model_type": "swin",
        "image_size": config.img_size,
        "patch_size": 4,
        "num_channels": config.in_chans,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "drop_path_rate": config.drop_path_rate,
        "hidden_size": config.num_features,
    }
    if config.num_classes:
        values["id2label"] = {str(index): f"LABEL_{index}" for index in range(config.num_classes)}
        values["label2id"] = {label: int(index) for index, label in values["id2label"].items()}
    return values


def image_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Read from a Swin's ``config.json`` what its tensors do not show.

    Raises:
        ValueError: it describes a model that ours does not compute.
    """
    wanted = {"patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_absolute_embeddings": False}
    for name, value in wanted.items():
        if values.get(name, value) != value:
            raise ValueError(f"config.json says {name}={values[name]!r}, and our Swin has {value!r}")
    names = {"image_size": "img_size", "drop_path_rate": "drop_path_rate", "window_size": "window_size"}
    return {ours: values[theirs] for theirs, ours in names.items() if isinstance(values.get(theirs), int | float)}


def text_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Read from the ``config.json`` of CLIP, or of its text tower, what the tensors do not show."""
    values = values.get("text_config") or values
    fields = {"act": values.get("hidden_act", "quick_gelu"), "norm_eps": values.get("layer_norm_eps", 1e-5)}
    if "num_attention_heads" in values:
        fields["heads"] = values["num_attention_heads"]
    return fields
