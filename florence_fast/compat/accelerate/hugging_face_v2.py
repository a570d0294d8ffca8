"""Hugging Face's Swin V2 on `florence_fast.ops`: the same for ``Swinv2Layer`` and its copy in Swin2SR.

What differs from Swin (arXiv 2111.09883, sections 3.2 and 3.3): the attention is a cosine with a learned scale, a small
network makes the table of position biases, and each branch is normalised at its end. Windows and shift are settled when
a layer is built; the key has no bias.

Their mask lowers a pair that a shift has joined by 200, ours takes it out: the same to rounding unless a row's own
scores lie below -100, which takes a scale near its limit of 100.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate import hugging_face, merges, pieces
from florence_fast.compat.accelerate.hugging_face import Parts
from florence_fast.compat.accelerate.options import Options
from florence_fast.compat.accelerate.pieces import StandIn

LAYERS = {
    ("transformers.models.swinv2.modeling_swinv2", "Swinv2Layer"),
    ("transformers.models.swin2sr.modeling_swin2sr", "Swin2SRLayer"),
}
MERGES = {(module, name.replace("Layer", "PatchMerging")) for module, name in LAYERS}
LOOKS_FOR = "transformers' " + ", ".join(sorted(name for _, name in LAYERS | MERGES))


def _parts(layer: nn.Module) -> Parts:
    inner = layer.attention.self
    linears, containers = (inner.query, inner.key, inner.value), (layer.attention, inner, inner.dropout)
    coordinates = inner.relative_coords_table  # (1, 2 * window - 1, 2 * window - 1, 2)
    window = (coordinates.shape[1] + 1) // 2
    return Parts(linears, coordinates, inner.num_attention_heads, inner.dropout.p, containers, window)


def forward(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    output_attentions: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for Swinv2Layer.forward of transformers 5.x: (B, H*W, C) to the same."""
    if hugging_face.needs_own_forward(layer, _parts, input_dimensions, output_attentions, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, output_attentions)
    return _compute(layer, hidden_states, input_dimensions, options)


def forward_with_head_mask(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of transformers 4.x, which can switch heads off."""
    wanted = output_attentions or head_mask is not None
    if hugging_face.needs_own_forward(layer, _parts, input_dimensions, wanted, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, head_mask, output_attentions)
    return _compute(layer, hidden_states, input_dimensions, options)


def _compute(layer: nn.Module, x: Tensor, input_dimensions: tuple[int, int], options: Options) -> tuple[Tensor]:
    if options.attention:
        out = hugging_face.project(layer, _attend(layer, x, input_dimensions), x)
    else:
        out = hugging_face.own_attention(layer, x, input_dimensions)
    x = x + layer.drop_path(pieces.norm(layer.layernorm_before, out, options))
    out = pieces.norm(layer.layernorm_after, hugging_face.feed_forward(layer, x, options), options)
    return (x + layer.drop_path(out),)


def _attend(layer: nn.Module, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    """Map (B, H*W, C) to (B, H*W, C), up to the output projection."""
    inner, parts = layer.attention.self, _parts(layer)
    qkv, bias = pieces.joined_linear(x, parts.linears)
    # They look the network's answers up for every pair of tokens before the sigmoid; here one each is enough.
    table = 16 * torch.sigmoid(inner.continuous_position_bias_mlp(parts.table).flatten(0, -2))
    out = ops.window_attention(
        qkv.view(len(x), *input_dimensions, -1),
        table,
        window_size=parts.window,
        num_heads=parts.num_heads,
        shift_size=int(layer.shift_size),
        logit_scale=inner.logit_scale,
        pad_mode="bias",  # they pad before q, k and v are computed
        qkv_bias=qkv.new_zeros(qkv.shape[-1]) if bias is None else bias,
    )
    return out.flatten(1, 2)


def forward_merging(
    module: nn.Module, input_feature: Tensor, input_dimensions: tuple[int, int], *, options: Options
) -> Tensor:
    """Stand in for Swinv2PatchMerging.forward, which normalises after the product: (B, H*W, C) to (B, H/2*W/2, 2C)."""
    return hugging_face.merge_tokens(merges.reduce_then_norm, module, input_feature, input_dimensions)


def _layer_reasons(layer: nn.Module, options: Options) -> Iterable[str]:
    layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense  # noqa: B018 - are they there?
    if not options.attention:
        return
    parts = _parts(layer)
    yield from pieces.linear_reasons("q, k and v", *parts.linears)
    if not hugging_face.untouched(*parts.linears, *parts.containers):
        yield "its attention has hooks or another forward, which would no longer run"
    if parts.table.shape != (1, 2 * parts.window - 1, 2 * parts.window - 1, 2):
        yield f"the windows must be square, got coordinates of shape {tuple(parts.table.shape)}"


_START = ("hidden_states", "input_dimensions")
FORWARDS: dict[Callable[..., Any], StandIn] = {
    forward: StandIn((*_START, "output_attentions"), _layer_reasons),
    forward_with_head_mask: StandIn((*_START, "head_mask", "output_attentions"), _layer_reasons),
    forward_merging: StandIn(("input_feature", "input_dimensions"), hugging_face.merging_reasons),
}


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, LAYERS | MERGES)
    return None if known is None else f"transformers {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a module with a ``kind``, or the reason why none can."""
    return pieces.stand_in(module, LAYERS, MERGES, FORWARDS, options, "transformers")
