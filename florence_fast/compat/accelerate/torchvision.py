"""torchvision's Swin, Swin V2 and Swin3D on `florence_fast.ops`.

torchvision itself is not imported: layers are known by module and name of their class. Attention and block are swapped
apart, since torchvision's attention takes the whole map: an attention in a block of somebody else's is accelerated too.
A map smaller than the window is filled up with tokens in 2-D; in 3-D the window shrinks, and its bias is read from the
leading corner of the index, which is that of the smaller window only while the map is short in time alone.

B batch · T frames · H W map height and width · C channels · h heads
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate import merges, pieces
from florence_fast.compat.accelerate import swin_block as swin
from florence_fast.compat.accelerate.options import Options
from florence_fast.models.layers import is_plain

_2D, _3D = "torchvision.models.swin_transformer", "torchvision.models.video.swin_transformer"
BLOCKS = {(_2D, "SwinTransformerBlock"), (_2D, "SwinTransformerBlockV2")}
ATTENTIONS = {(_2D, "ShiftedWindowAttention"), (_2D, "ShiftedWindowAttentionV2"), (_3D, "ShiftedWindowAttention3d")}
MERGINGS = {(_2D, "PatchMerging"), (_2D, "PatchMergingV2")}
LOOKS_FOR = "torchvision's ShiftedWindowAttention, ShiftedWindowAttention3d, SwinTransformerBlock, PatchMerging"


def block_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerBlock.forward, 2-D and 3-D: (B, ..., C) to the same."""
    if swin.is_traced(x):
        return type(block).forward(block, x)
    branch = block.attn(pieces.norm(block.norm1, x, options))
    x, normed = swin.add_and_norm(x, branch, block.stochastic_depth, block.norm2, options)
    return x + block.stochastic_depth(swin.mlp(block.mlp, normed, options))


def block_v2_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerBlockV2.forward, whose norms come after the branches."""
    if swin.is_traced(x):
        return type(block).forward(block, x)
    x = x + block.stochastic_depth(pieces.norm(block.norm1, block.attn(x), options))
    return x + block.stochastic_depth(pieces.norm(block.norm2, swin.mlp(block.mlp, x, options), options))


def attention_forward(attn: nn.Module, x: Tensor) -> Tensor:
    """Stand in for ShiftedWindowAttention.forward: (B, H, W, C) to the same."""
    if _needs_own_forward(attn, x):
        return type(attn).forward(attn, x)
    sizes = {"window": attn.window_size, "shift": _shift(attn, x), "num_heads": attn.num_heads}
    return _project(attn, swin.attend(x, (attn.qkv.weight, attn.qkv.bias), attn.relative_position_bias_table, **sizes))


def attention_v2_forward(attn: nn.Module, x: Tensor) -> Tensor:
    """Stand in for ShiftedWindowAttentionV2.forward, by cosines: (B, H, W, C) to the same."""
    if _needs_own_forward(attn, x):
        return type(attn).forward(attn, x)
    bias = attn.qkv.bias
    if bias is not None:  # that of k counts as zero, whatever it is
        kept = torch.ones(3, 1, dtype=bias.dtype, device=bias.device)
        kept[1] = 0
        bias = (bias.view(3, -1) * kept).flatten()
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
    sizes = {"window": attn.window_size, "shift": _shift(attn, x), "num_heads": attn.num_heads}
    return _project(attn, swin.attend(x, (attn.qkv.weight, bias), table, logit_scale=attn.logit_scale, **sizes))


def attention_3d_forward(attn: nn.Module, x: Tensor) -> Tensor:
    """Stand in for ShiftedWindowAttention3d.forward: (B, T, H, W, C) to the same."""
    if _needs_own_forward(attn, x):
        return type(attn).forward(attn, x)
    window, shift, bias = swin.shrunken(x.shape[1:4], attn.window_size, attn.shift_size, attn)
    sizes = {"window": window, "shift": shift, "num_heads": attn.num_heads}
    table = attn.relative_position_bias_table if bias is None else None
    return _project(attn, swin.attend(x, (attn.qkv.weight, attn.qkv.bias), table, bias=bias, **sizes))


def merging_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for PatchMerging.forward: (B, [T,] H, W, C) to (B, [T,] H/2, W/2, 2C)."""
    merged = None if swin.is_traced(x) or x.ndim not in (4, 5) else merges.norm_then_reduce(merging, x)
    return type(merging).forward(merging, x) if merged is None else merged


def merging_v2_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for PatchMergingV2.forward, which norms what it has reduced: (..., H, W, C) to (..., H/2, W/2, 2C)."""
    merged = None if swin.is_traced(x) else merges.reduce_then_norm(merging, x)
    return type(merging).forward(merging, x) if merged is None else merged


_ATTENTION_FORWARDS = {
    "ShiftedWindowAttention": attention_forward,
    "ShiftedWindowAttentionV2": attention_v2_forward,
    "ShiftedWindowAttention3d": attention_3d_forward,
}
_MERGING_FORWARDS = {"PatchMerging": merging_forward, "PatchMergingV2": merging_v2_forward}
FORWARDS = {block_forward, block_v2_forward, *_MERGING_FORWARDS.values(), *_ATTENTION_FORWARDS.values()}


def _shift(attn: nn.Module, x: Tensor) -> list[int]:
    """Give the shift per axis: none where the completed map is one window."""
    pairs = zip(x.shape[1:3], attn.window_size, attn.shift_size, strict=True)
    return [0 if side <= window else by for side, window, by in pairs]


def _project(attn: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(ops.linear(x, attn.proj.weight, attn.proj.bias), attn.dropout, attn.training)


def _needs_own_forward(attn: nn.Module, x: Tensor) -> bool:
    """Say whether the op would not compute the same. Their forward reads the weights of qkv and proj as ours does."""
    if swin.is_traced(x):
        return True
    return swin.drops_attention(attn.attention_dropout, attn.training, "torchvision's attention_dropout")


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, BLOCKS | ATTENTIONS | MERGINGS)
    return None if known is None else f"torchvision {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    known = pieces.known_class(module, BLOCKS | ATTENTIONS | MERGINGS)
    if (known.__module__, known.__name__) in MERGINGS:
        return swin.merging_reason(module, known, options, "torchvision") or _MERGING_FORWARDS[known.__name__]
    changed = swin.other_methods(module, known, "forward")
    if changed is not None:
        return changed
    try:
        if (known.__module__, known.__name__) in ATTENTIONS:
            return _attention_reason(module, options) or _ATTENTION_FORWARDS[known.__name__]
        _ = (module.attn, module.norm1, module.norm2, module.mlp, module.stochastic_depth.p)
    except AttributeError as error:
        return swin.missing_part(error, "torchvision")
    forward = partial(block_v2_forward if known.__name__.endswith("V2") else block_forward, options=options)
    return pieces.switched_off(options, "mlp", "norm") or forward


def _attention_reason(attn: nn.Module, options: Options) -> str | None:
    unasked = pieces.switched_off(options, "attention")
    if unasked is not None:
        return unasked
    _ = (attn.attention_dropout, attn.dropout, attn.shift_size, attn.relative_position_index)
    for linear in (attn.qkv, attn.proj):
        if not is_plain(linear, kinds=(nn.Linear,)):
            return f"q, k, v and the projection must be plain nn.Linear without hooks, got {type(linear).__name__}"
    if hasattr(attn, "logit_scale"):
        return None
    return swin.table_reason(attn.relative_position_bias_table, attn.window_size, attn.num_heads)
