"""The window attention of Hugging Face's Swin on `florence_fast.ops`: the forwards that `accelerate` puts into layers.

A layer's forward is replaced whole, since theirs rolls, pads and cuts the map before the attention sees it. Known are
``SwinLayer`` of transformers 4.x and 5.x and its copies in Donut and in CLAP's audio tower. transformers itself is not
imported: layers are known by the module and name of their class, by the arguments of their forward and by their parts.

Whatever the op does not compute goes through the layer's own forward, call by call; `_needs_own_forward` lists it.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops

CLASSES = {
    ("transformers.models.swin.modeling_swin", "SwinLayer"),
    ("transformers.models.donut.modeling_donut_swin", "DonutSwinLayer"),
    ("transformers.models.clap.modeling_clap", "ClapAudioLayer"),
}
LOOKS_FOR = "transformers' " + ", ".join(sorted(name for _, name in CLASSES))


class _Parts(NamedTuple):
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


def _parts_5(layer: nn.Module) -> _Parts:
    attention = layer.attention
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    position = attention.relative_position_bias
    containers = (attention, position)
    table = position.relative_position_bias_table
    return _Parts(linears, table, attention.num_attention_heads, attention.attention_dropout, containers)


def _parts_4(layer: nn.Module) -> _Parts:
    inner = layer.attention.self
    linears = (inner.query, inner.key, inner.value)
    table, containers = inner.relative_position_bias_table, (layer.attention, inner, inner.dropout)
    return _Parts(linears, table, inner.num_attention_heads, inner.dropout.p, containers)


def forward_5(
    layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Stand in for SwinLayer.forward of transformers 5.x: (B, H*W, C) to the same and no attention weights."""
    wants_weights = kwargs.get("output_attentions", getattr(layer.attention.config, "output_attentions", False))
    if _needs_own_forward(layer, _parts_5(layer), input_dimensions, always_partition, wants_weights):
        return type(layer).forward(layer, hidden_states, input_dimensions, always_partition, **kwargs)
    # Their class checkpoints its forward and not its call, so that this forward has to do it as well.
    own = type(layer).forward
    if hasattr(own, "__wrapped__") and layer.training and getattr(layer, "gradient_checkpointing", False):
        return layer._gradient_checkpointing_func(partial(_compute_5, layer), hidden_states, input_dimensions), None
    return _compute_5(layer, hidden_states, input_dimensions), None


def _compute_5(layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    out = _attend(layer, _parts_5(layer), layer.layernorm_before(hidden_states), input_dimensions)
    hidden_states = hidden_states + layer.drop_path(layer.dropout(layer.attention.o_proj(out)))
    return layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))) + hidden_states


def forward_4_with_head_mask(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of transformers 4.x, which can switch heads off."""
    wanted = output_attentions or head_mask is not None
    if _needs_own_forward(layer, _parts_4(layer), input_dimensions, always_partition, wanted):
        args = (hidden_states, input_dimensions, head_mask, output_attentions, always_partition)
        return type(layer).forward(layer, *args)
    return _compute_4(layer, hidden_states, input_dimensions)


def forward_4(
    layer: nn.Module,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
) -> tuple[Tensor, ...]:
    """Stand in for the forward of the copies in Donut and CLAP of transformers 5.x."""
    if _needs_own_forward(layer, _parts_4(layer), input_dimensions, always_partition, output_attentions):
        return type(layer).forward(layer, hidden_states, input_dimensions, output_attentions, always_partition)
    return _compute_4(layer, hidden_states, input_dimensions)


def _compute_4(layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int]) -> tuple[Tensor]:
    normed = layer.layernorm_before(hidden_states)
    out = _attend(layer, _parts_4(layer), normed, input_dimensions)
    hidden_states = hidden_states + layer.drop_path(layer.attention.output(out, normed))
    return (hidden_states + layer.output(layer.intermediate(layer.layernorm_after(hidden_states))),)


def _attend(layer: nn.Module, parts: _Parts, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    """Map (B, H*W, C) to (B, H*W, C), up to the output projection.

    The three weights are joined at every call, so that they stay three parameters. Joining the three results instead
    took 1.0 to 1.4 times as long in the stages of Swin-T at batch 8 on a CPU (float32, bf16, autocast and with
    backward; 0.94 at the least). It is faster where the rows are fewer than the channels: 0.4 at batch 1 and 49 rows.
    """
    biases = [linear.bias for linear in parts.linears]
    bias = None if biases[0] is None else torch.cat(biases)
    qkv = F.linear(x, torch.cat([linear.weight for linear in parts.linears]), bias)
    out = ops.window_attention(
        qkv.view(len(x), *input_dimensions, -1),
        parts.table,
        window_size=_window(parts.table),
        num_heads=parts.num_heads,
        shift_size=int(layer.shift_size),
        pad_mode="bias",  # they pad before q, k and v are computed
        qkv_bias=qkv.new_zeros(qkv.shape[-1]) if bias is None else bias,
    )
    return out.flatten(1, 2)


def _window(table: Tensor) -> int:
    return (math.isqrt(len(table)) + 1) // 2


def _needs_own_forward(
    layer: nn.Module,
    parts: _Parts,
    input_dimensions: tuple[int, int],
    always_partition: bool | None,
    wants_weights: Any,
) -> bool:
    """Say whether this call must go through the layer's own forward, because the op would not compute the same.

    Attention weights and head masks, and torch.jit.trace; dropout of the probabilities in training; a linear of q, k
    or v that is no longer a plain one (LoRA, quantised), hooks on what is not called any more; windows as they stand
    only in theirs: one larger than the map, for which their forward raises unless ``always_partition``, and then pads
    and shifts even a map of one window.
    """
    if not always_partition:
        # It changes the layer for all later calls, and so it does in their forward: one call on a map no larger than
        # the window ends the shift for good.
        layer.set_shift_and_window_size(input_dimensions)
    if wants_weights or torch.jit.is_tracing():
        return True
    if layer.training and parts.dropout > 0:
        if not torch.compiler.is_compiling():
            _warn_of_dropout(parts.dropout)
        return True
    if any(type(linear) is not nn.Linear for linear in parts.linears) or _is_watched(parts):
        return True
    window = _window(parts.table)
    if layer.window_size != window:
        return True
    return any(side < window or (side == window and layer.shift_size > 0) for side in input_dimensions)


def _is_watched(parts: _Parts) -> bool:
    """Say whether a module that is read and not called has hooks, or another forward than its class's."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in (*parts.linears, *parts.containers)
    )


@cache
def _warn_of_dropout(probability: float) -> None:
    warnings.warn(
        f"attention_probs_dropout_prob={probability} drops attention weights in training, which the kernels cannot: "
        "these layers run their own forward until model.eval(); set it to 0 to train on the kernels",
        stacklevel=2,
    )


FORWARDS: dict[Callable[..., Any], tuple[tuple[str, ...], Callable[[nn.Module], _Parts]]] = {
    forward_5: (("hidden_states", "input_dimensions", "always_partition", "kwargs"), _parts_5),
    forward_4: (("hidden_states", "input_dimensions", "output_attentions", "always_partition"), _parts_4),
    forward_4_with_head_mask: (
        ("hidden_states", "input_dimensions", "head_mask", "output_attentions", "always_partition"),
        _parts_4,
    ),
}
"""Each forward of ours, the arguments of the one that it stands in for, and where that one's layer keeps its parts."""


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = _known_class(module)
    return None if known is None else f"transformers {known.__name__}"


def _known_class(module: nn.Module) -> type | None:
    return next((cls for cls in type(module).__mro__ if (cls.__module__, cls.__name__) in CLASSES), None)


def replacement(layer: nn.Module) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    theirs = inspect.unwrap(type(layer).forward)
    if theirs is not inspect.unwrap(_known_class(layer).forward):
        return f"{type(layer).__name__} has a forward of its own"
    names = tuple(inspect.signature(theirs).parameters)[1:]
    ours = next((forward for forward, (arguments, _) in FORWARDS.items() if arguments == names), None)
    if ours is None:
        return f"a version of transformers whose forward takes other arguments: {', '.join(names)}"
    try:
        parts = FORWARDS[ours][1](layer)
    except AttributeError as error:
        return f"a version of transformers with other parts: {error}"
    return next(iter(_reasons(layer, parts)), ours)


def _reasons(layer: nn.Module, parts: _Parts) -> Iterable[str]:
    config = getattr(layer.attention, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        yield f"it was set to the attention {attention!r}, and only 'eager' and 'sdpa' are replaced"
    for linear in parts.linears:
        if type(linear) is not nn.Linear:
            yield f"q, k and v must come from plain nn.Linear, got {type(linear).__name__}"
        elif type(linear.weight) is not nn.Parameter:
            yield f"the weights of q, k and v must be plain parameters, got {type(linear.weight).__name__}"
    if _is_watched(parts):
        yield "its attention has hooks or another forward, which would no longer run"
    if parts.table.shape != ((2 * _window(parts.table) - 1) ** 2, parts.num_heads):
        yield f"the windows must be square, got a bias table of shape {tuple(parts.table.shape)}"
