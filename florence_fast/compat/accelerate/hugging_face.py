"""Hugging Face's Swin on `florence_fast.ops`: the forwards that `accelerate` puts into its layers and merges.

A layer's forward is replaced whole, since theirs rolls, pads and cuts the map before the attention sees it. Known are
``SwinLayer`` and ``SwinPatchMerging`` of transformers 4.x and 5.x and their copies in Donut, in MaskFormer and in
CLAP's audio tower; `hugging_face_v2` has those of Swin V2. transformers itself is not imported: modules are known by
the module and name of their class, by the arguments of their forward and by their parts.

Whatever the ops do not compute goes through the module's own forward, call by call; `needs_own_forward` lists it.
Switched off, the attention is the module's own, called on windows that we cut.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate import merges, pieces, their_attention
from florence_fast.compat.accelerate.options import Options
from florence_fast.compat.accelerate.pieces import StandIn
from florence_fast.models.layers import is_plain

LAYERS = {
    ("transformers.models.swin.modeling_swin", "SwinLayer"),
    ("transformers.models.donut.modeling_donut_swin", "DonutSwinLayer"),
    ("transformers.models.maskformer.modeling_maskformer_swin", "MaskFormerSwinLayer"),
    ("transformers.models.clap.modeling_clap", "ClapAudioLayer"),
}
MERGES = {(module, name.replace("Layer", "PatchMerging")) for module, name in LAYERS}
LOOKS_FOR = "transformers' " + ", ".join(sorted(name for _, name in LAYERS | MERGES))


untouched = partial(pieces.untouched, "transformers")


class Parts(NamedTuple):
    """What the attention of a layer is made of, wherever its version of transformers keeps it."""

    linears: tuple[nn.Module, nn.Module, nn.Module]
    """Those of q, k and v."""
    table: Tensor
    """((2 * window - 1)**2, h)"""
    num_heads: int
    dropout: float
    """Of the probabilities."""
    containers: tuple[nn.Module, ...]
    """The modules that are read and no longer called, beside the linears."""
    window: int
    """Tokens along a side of the window for which the bias was made."""


def _parts_5(layer: nn.Module) -> Parts:
    attention = layer.attention
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    position = attention.relative_position_bias
    containers = (attention, position)
    table = position.relative_position_bias_table
    heads, dropout = attention.num_attention_heads, attention.attention_dropout
    return Parts(linears, table, heads, dropout, containers, _window(table))


def _parts_4(layer: nn.Module) -> Parts:
    inner = layer.attention.self
    linears = (inner.query, inner.key, inner.value)
    table, containers = inner.relative_position_bias_table, (layer.attention, inner, inner.dropout)
    return Parts(linears, table, inner.num_attention_heads, inner.dropout.p, containers, _window(table))


def forward_5(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    always_partition: bool = False,
    *,
    options: Options,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for SwinLayer.forward of transformers 5.x: (B, H*W, C) to the same and no attention weights."""
    config = getattr(layer.attention, "config", None)
    wants_weights = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    _end_shift(layer, input_dimensions, always_partition)
    if needs_own_forward(layer, _parts_5, input_dimensions, wants_weights, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, always_partition, **kwargs)
    # Their class checkpoints its forward and not its call, so that this forward has to do it as well.
    compute = partial(_compute_5, layer, options=options)
    if (
        hasattr(type(layer).forward, "__wrapped__")
        and layer.training
        and getattr(layer, "gradient_checkpointing", False)
    ):
        return layer._gradient_checkpointing_func(compute, hidden_states, input_dimensions), None
    return compute(hidden_states, input_dimensions), None


def _compute_5(layer: nn.Module, x: Tensor, input_dimensions: tuple[int, int], options: Options) -> Tensor:
    normed = pieces.norm(layer.layernorm_before, x, options)
    if options.attention:
        out = _attend(layer, _parts_5(layer), normed, input_dimensions)
        branch = layer.dropout(pieces.linear(layer.attention.o_proj, out))
    else:
        branch = own_attention(layer, normed, input_dimensions, layer.dropout)
    x, normed = pieces.add_and_norm(x, branch, layer.drop_path, layer.layernorm_after, options)
    mlp = layer.mlp
    out = None
    if options.mlp and untouched(mlp):
        out = pieces.mlp(normed, mlp.fc1, mlp.activation_fn, mlp.fc2)
    return layer.dropout(mlp(normed) if out is None else out) + x


def forward_4_with_head_mask(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of transformers 4.x, which can switch heads off."""
    _end_shift(layer, input_dimensions, always_partition)
    if needs_own_forward(layer, _parts_4, input_dimensions, output_attentions or head_mask is not None, options):
        args = (hidden_states, input_dimensions, head_mask, output_attentions, always_partition)
        return type(layer).forward(layer, *args)
    return _compute_4(layer, hidden_states, input_dimensions, options)


def forward_4(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of the copies in Donut and CLAP of transformers 5.x."""
    _end_shift(layer, input_dimensions, always_partition)
    if needs_own_forward(layer, _parts_4, input_dimensions, output_attentions, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, output_attentions, always_partition)
    return _compute_4(layer, hidden_states, input_dimensions, options)


def forward_4_fixed(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    output_attentions: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of MaskFormer's copy of transformers 5.x, whose window and shift never change."""
    if needs_own_forward(layer, _parts_4, input_dimensions, output_attentions, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, output_attentions)
    return _compute_4(layer, hidden_states, input_dimensions, options)


def forward_4_fixed_with_head_mask(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    *,
    options: Options,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of MaskFormer's copy of transformers 4.x."""
    if needs_own_forward(layer, _parts_4, input_dimensions, output_attentions or head_mask is not None, options):
        return type(layer).forward(layer, hidden_states, input_dimensions, head_mask, output_attentions)
    return _compute_4(layer, hidden_states, input_dimensions, options)


def _compute_4(layer: nn.Module, x: Tensor, input_dimensions: tuple[int, int], options: Options) -> tuple[Tensor]:
    normed = pieces.norm(layer.layernorm_before, x, options)
    if options.attention:
        branch = project(layer, _attend(layer, _parts_4(layer), normed, input_dimensions), normed)
    else:
        branch = own_attention(layer, normed, input_dimensions)
    x, normed = pieces.add_and_norm(x, branch, layer.drop_path, layer.layernorm_after, options)
    return (x + feed_forward(layer, normed, options),)


def project(layer: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """Return the output projection of a layer in the layout of 4.x, with its dropout."""
    output = layer.attention.output
    return output.dropout(pieces.linear(output.dense, out)) if untouched(output) else output(out, x)


def feed_forward(layer: nn.Module, x: Tensor, options: Options) -> Tensor:
    """Return the feed-forward branch of a layer in the layout of 4.x, with its dropout."""
    first, second = layer.intermediate, layer.output
    out = None
    if options.mlp and untouched(first, second):
        out = pieces.mlp(x, first.dense, first.intermediate_act_fn, second.dense)
    return second(first(x)) if out is None else second.dropout(out)


def _attend(layer: nn.Module, parts: Parts, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    """Map (B, H*W, C) to (B, H*W, C), up to the output projection."""
    qkv, bias = pieces.joined_linear(x, parts.linears)
    out = ops.window_attention(
        qkv.view(len(x), *input_dimensions, -1),
        parts.table,
        window_size=parts.window,
        num_heads=parts.num_heads,
        shift_size=int(layer.shift_size),
        pad_mode="bias",  # they pad before q, k and v are computed
        qkv_bias=qkv.new_zeros(qkv.shape[-1]) if bias is None else bias,
    )
    return out.flatten(1, 2)


def own_attention(
    layer: nn.Module, x: Tensor, input_dimensions: tuple[int, int], dropout: nn.Module | None = None
) -> Tensor:
    """Map (B, H*W, C) to the same by the layer's own attention, and by a dropout that sees windows as well."""
    x = x.unflatten(1, tuple(input_dimensions))
    window, shift = int(layer.window_size), int(layer.shift_size)
    mask = their_attention.shift_mask(x, window, shift)

    def attend(windows: Tensor) -> Tensor:
        out = layer.attention(windows, mask)[0]
        return out if dropout is None else dropout(out)

    return their_attention.through_windows(x, window, shift, attend).flatten(1, 2)


def _window(table: Tensor) -> int:
    return (math.isqrt(len(table)) + 1) // 2


def _end_shift(layer: nn.Module, input_dimensions: tuple[int, int], always_partition: bool | None) -> None:
    """Change the layer for all later calls, as their forward does.

    One call on a map no larger than the window ends the shift for good.
    """
    if not always_partition:
        layer.set_shift_and_window_size(input_dimensions)


def needs_own_forward(
    layer: nn.Module,
    parts_of: Callable[[nn.Module], Parts],
    input_dimensions: tuple[int, int],
    wants_weights: Any,
    options: Options,
) -> bool:
    """Say whether this call must go through the layer's own forward, because ours would not compute the same.

    Attention weights and head masks, and torch.jit.trace; dropout of the probabilities in training; a linear of q, k
    or v that is no longer a plain one (LoRA, quantised), hooks on what is not called any more, another attention
    altogether; windows as they stand only in theirs: one larger than the map, for which their forward raises unless
    ``always_partition``, and then pads and shifts even a map of one window.
    """
    if wants_weights and not torch.compiler.is_compiling():
        pieces.warn_of_weights("output_attentions or head_mask was asked for")
    if wants_weights or torch.jit.is_tracing():
        return True
    if not options.attention:
        return False
    try:
        parts = parts_of(layer)
    except AttributeError:
        return True
    if layer.training and parts.dropout > 0:
        if not torch.compiler.is_compiling():
            pieces.warn_of_dropout(f"attention_probs_dropout_prob={parts.dropout}")
        return True
    if not is_plain(*parts.linears, kinds=(nn.Linear,)) or not untouched(*parts.containers):
        return True
    window = parts.window
    if layer.window_size != window:
        return True
    return any(side < window or (side == window and layer.shift_size > 0) for side in input_dimensions)


def forward_merging(
    module: nn.Module, input_feature: Tensor, input_dimensions: tuple[int, int], *, options: Options
) -> Tensor:
    """Stand in for SwinPatchMerging.forward: (B, H*W, C) to (B, H/2*W/2, 2C), both halves rounded up."""
    return merge_tokens(merges.norm_then_reduce, module, input_feature, input_dimensions)


def merge_tokens(
    merge: Callable[[nn.Module, Tensor], Tensor | None],
    module: nn.Module,
    input_feature: Tensor,
    input_dimensions: tuple[int, int],
) -> Tensor:
    """Let one of `merges` stand in for the module's own forward, which runs where that cannot."""
    merged = None
    if not torch.jit.is_tracing():
        merged = merge(module, input_feature.unflatten(1, tuple(input_dimensions)))
    own = type(module).forward
    return own(module, input_feature, input_dimensions) if merged is None else merged.flatten(1, 2)


def _reasons_5(layer: nn.Module, options: Options) -> Iterable[str]:
    layer.attention.o_proj, layer.mlp.fc1, layer.mlp.activation_fn, layer.mlp.fc2  # noqa: B018 - are they there?
    if options.attention:
        yield from layer_reasons(layer, _parts_5(layer))


def _reasons_4(layer: nn.Module, options: Options) -> Iterable[str]:
    layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense  # noqa: B018 - the same
    if options.attention:
        yield from layer_reasons(layer, _parts_4(layer))


def layer_reasons(layer: nn.Module, parts: Parts) -> Iterable[str]:
    """Say why a layer with these parts must keep its own forward."""
    config = getattr(layer.attention, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        yield f"it was set to the attention {attention!r}, and only 'eager' and 'sdpa' are replaced"
    yield from pieces.linear_reasons("q, k and v", *parts.linears)
    if not untouched(*parts.linears, *parts.containers):
        yield "its attention has hooks or another forward, which would no longer run"
    if parts.table.shape != ((2 * parts.window - 1) ** 2, parts.num_heads):
        yield f"the windows must be square, got a bias table of shape {tuple(parts.table.shape)}"


def merging_reasons(module: nn.Module, options: Options) -> Iterable[str]:
    """Say why a merge must keep its own forward."""
    yield from merges.reasons(module)


_START = ("hidden_states", "input_dimensions")
FORWARDS: dict[Callable[..., Any], StandIn] = {
    forward_5: StandIn((*_START, "always_partition", "kwargs"), _reasons_5),
    forward_4: StandIn((*_START, "output_attentions", "always_partition"), _reasons_4),
    forward_4_with_head_mask: StandIn((*_START, "head_mask", "output_attentions", "always_partition"), _reasons_4),
    forward_4_fixed: StandIn((*_START, "output_attentions"), _reasons_4),
    forward_4_fixed_with_head_mask: StandIn((*_START, "head_mask", "output_attentions"), _reasons_4),
    forward_merging: StandIn(("input_feature", "input_dimensions"), merging_reasons),
}


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, LAYERS | MERGES)
    return None if known is None else f"transformers {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a module with a ``kind``, or the reason why none can."""
    return pieces.stand_in(module, LAYERS, MERGES, FORWARDS, options, "transformers")
