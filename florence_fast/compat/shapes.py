"""Infer a model's configuration from the shapes of its tensors, which carry our names.

Not in the shapes, and therefore the caller's to say: the image size, drop path, the heads of a text tower (64 channels
each unless told), its activation and the eps of its norms.
"""

from __future__ import annotations

import math
import re
from typing import Any

from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.models.layouts import State

_TABLE = "attn.relative_position_bias_table"
_TEXT_HEAD = 64
_MOST_BLOCKS = 1000


def image_config(state: State, **fields: Any) -> ImageConfig:
    """Return the configuration of an image tower whose tensors have no prefix; ``fields`` win over what is read.

    Raises:
        ValueError: there is no stem of ours, or a stage without blocks.
    """
    stem = shape_of(state, "patch_embed.proj.weight", 4) if "patch_embed.proj.weight" in state else None
    if stem is None or stem[2:] not in ((4, 4), (7, 7)):
        found = "nothing" if stem is None else stem
        raise ValueError(f"a Swin has patch_embed.proj.weight (C, 3, 4, 4), a CoSwin (C, 3, 7, 7); found {found}")
    depths = _depths(state, r"layers\.(\d+)\.blocks\.(\d+)\.")
    names = [f"layers.{stage}.blocks.0.{_TABLE}" for stage in range(len(depths))]
    if not names or any(name not in state for name in names):
        raise ValueError(f"no stage may lack its first block's bias table; found stages of {depths} blocks")
    tables = [shape_of(state, name, 2) for name in names]
    fc1 = "layers.0.blocks.0.mlp.fc1.weight"
    read = {
        "kind": "swin" if stem[2] == 4 else "coswin",
        "embed_dim": stem[0],
        "in_chans": stem[1],
        "depths": depths,
        "num_heads": tuple(heads for _, heads in tables),
        "window_size": max((math.isqrt(rows) + 1) // 2 for rows, _ in tables),
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
        "num_classes": shape_of(state, "head.weight", 2)[0] if "head.weight" in state else 0,
    }
    if fc1 in state:
        read["mlp_ratio"] = _ratio(state, fc1)
    return ImageConfig(**{**read, **fields})


def text_config(state: State, **fields: Any) -> TextConfig:
    """Return the configuration of a text tower whose tensors have no prefix; ``fields`` win over what is read.

    Raises:
        ValueError: its embeddings are missing.
    """
    if "token_embedding.weight" not in state or "positional_embedding" not in state:
        raise ValueError("a text tower needs token_embedding.weight and positional_embedding")
    vocab_size, token_width = shape_of(state, "token_embedding.weight", 2)
    context_length, width = shape_of(state, "positional_embedding", 2)
    fc = "resblocks.0.mlp.c_fc.weight"
    read = {
        "width": width,
        "heads": max(width // _TEXT_HEAD, 1),
        "layers": sum(_depths(state, r"()resblocks\.(\d+)\.")),
        "vocab_size": vocab_size,
        "context_length": context_length,
        "token_embed_dim": token_width if "token_projection.weight" in state else None,
    }
    if fc in state:
        read["mlp_ratio"] = _ratio(state, fc)
    return TextConfig(**{**read, **fields})


def part(state: State, prefix: str) -> State:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def model_config(
    state: State, image: dict[str, Any], text: dict[str, Any], whole: dict[str, Any]
) -> FlorenceConfig | ImageConfig | TextConfig:
    """Return the configuration of a dual encoder, or of the one tower that is there.

    Args:
        state: name -> tensor under our names; a tower's have ``visual.`` or ``text.`` before them, or none.
        image: fields of the image tower that win over what is read.
        text: fields of the text tower.
        whole: fields of the dual encoder.

    Raises:
        ValueError: no tower is found, or one that ours cannot be.
    """
    visual, written = part(state, "visual."), part(state, "text.")
    if not visual and not written:
        return image_config(state, **image)
    if not written:
        return image_config(visual, **image)
    if not visual or "image_projection.weight" not in state:
        return text_config(written, **text)
    shared, _ = shape_of(state, "image_projection.weight", 2)
    return FlorenceConfig(image_config(visual, **image), text_config(written, **text), shared, **whole)


def shape_of(state: State, name: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor that is there.

    Raises:
        ValueError: it has another number of axes than ``ndim``, or an empty one.
    """
    shape = tuple(state[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name} must have {ndim} axes and no empty one, got the shape {shape}")
    return shape


def _ratio(state: State, name: str) -> float:
    """Rows by columns of a matrix."""
    rows, columns = shape_of(state, name, 2)
    return rows / columns


def _depths(state: State, pattern: str) -> tuple[int, ...]:
    """Count the blocks of each stage; the groups of ``pattern`` are the stage and the block."""
    blocks: dict[int, int] = {}
    for name in state:
        if match := re.match(pattern, name):
            stage, block = int(match[1] or 0), int(match[2])
            if max(stage, block) >= _MOST_BLOCKS:
                raise ValueError(f"no model has a block of this number: {name}")
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    return tuple(blocks.get(stage, 0) for stage in range(max(blocks, default=-1) + 1))


def refuse_other_swins(state: State) -> None:
    """Raise ValueError for relatives of Swin whose layers no model of ours has; any prefix may stand before names."""
    if any("cpb_mlp" in name or "continuous_position_bias" in name for name in state):
        raise ValueError("this is a Swin V2, whose attention and norms no model of ours has")
    if any(name.endswith(("absolute_pos_embed", "position_embeddings")) for name in state):
        raise ValueError("this Swin adds absolute position embeddings, which ours does not have")
