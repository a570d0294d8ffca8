"""timm's Swin (timm.models.swin_transformer; Swin-S3 is built of the same blocks) and its V2 on `florence_fast.ops`.

timm itself is not imported: layers are known by module and name of their class and by their parts. Sizes are read from
the layer at every call, so that ``set_input_size`` and dynamic image sizes may come later. timm rolls the map before it
completes the last windows, others after; `swin_block.attend` does both.

The attention of a call that the op would not compute the same goes through timm's own, the rest of the block stays:
dropout of the weights in training, hooks inside the attention, a shifted axis of one window (dynamic sizes,
``always_partition``), a map that the mask in the block is not for.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from florence_fast.compat.accelerate import merges, pieces
from florence_fast.compat.accelerate import swin_block as swin
from florence_fast.compat.accelerate.options import Options
from florence_fast.models.layers import is_plain

_V1, _V2 = "timm.models.swin_transformer", "timm.models.swin_transformer_v2"
BLOCKS = {(_V1, "SwinTransformerBlock"), (_V2, "SwinTransformerV2Block")}
MERGINGS = {(_V1, "PatchMerging"), (_V2, "PatchMerging")}
LOOKS_FOR = "timm's SwinTransformerBlock, SwinTransformerV2Block, PatchMerging"

_ATTENTIONS = {(_V1, "WindowAttention"), (_V2, "WindowAttention")}


def block_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerBlock.forward: (B, H, W, C) to the same."""
    if swin.is_traced(x):
        return type(block).forward(block, x)
    branch = _attention(block, pieces.norm(block.norm1, x, options), options)
    x, normed = swin.add_and_norm(x, branch, block.drop_path1, block.norm2, options)
    return x + block.drop_path2(swin.mlp(block.mlp, normed, options))


def block_v2_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerV2Block.forward, whose norms come after the branches."""
    if swin.is_traced(x):
        return type(block).forward(block, x)
    branch = _attention(block, x, options)
    x = x + block.drop_path1(pieces.norm(block.norm1, branch, options))
    return x + block.drop_path2(pieces.norm(block.norm2, swin.mlp(block.mlp, x, options), options))


def merging_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for PatchMerging.forward of V1: (B, H, W, C) to (B, H/2, W/2, C')."""
    merged = None if swin.is_traced(x) else merges.norm_then_reduce(merging, x)
    return type(merging).forward(merging, x) if merged is None else merged


def merging_v2_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for PatchMerging.forward of V2, which norms what it has reduced: (B, H, W, C) to (B, H/2, W/2, C')."""
    merged = None if swin.is_traced(x) else merges.reduce_then_norm(merging, x)
    return type(merging).forward(merging, x) if merged is None else merged


FORWARDS = {block_forward, block_v2_forward, merging_forward, merging_v2_forward}


def _attention(block: nn.Module, x: Tensor, options: Options) -> Tensor:
    if not options.attention or _needs_own_attention(block, x.shape[1:3]):
        return block._attn(x)
    attn = block.attn
    sizes = {"window": block.window_size, "shift": block.shift_size, "num_heads": attn.num_heads, "rolls_first": True}
    if hasattr(attn, "logit_scale"):
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        x = swin.attend(x, (attn.qkv.weight, bias), table, logit_scale=attn.logit_scale, **sizes)
    else:
        x = swin.attend(x, attn.qkv, attn.relative_position_bias_table, scale=attn.scale, **sizes)
    return attn.proj_drop(pieces.linear(attn.proj, x))


def _needs_own_attention(block: nn.Module, size: tuple[int, int]) -> bool:
    """Say whether the op would not compute the same as the block's own ``_attn``."""
    attn = block.attn
    if swin.drops_attention(attn.attn_drop.p, attn.training, "timm's attn_drop"):
        return True
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return True
    if hasattr(attn, "logit_scale") and not is_plain(attn.qkv):
        return True
    if not any(block.shift_size):
        return False
    windows = [-(-side // w) for side, w in zip(size, block.window_size, strict=True)]
    made_for = [-(-side // w) for side, w in zip(block.input_resolution, block.window_size, strict=True)]
    if not getattr(block, "dynamic_mask", False) and windows != made_for:
        return True
    return swin.one_window_is_shifted(size, block.window_size, block.shift_size)


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    return None if known is None else f"timm {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    if (known.__module__, known.__name__) in MERGINGS:
        forward = merging_v2_forward if known.__module__ == _V2 else merging_forward
        return swin.merging_reason(module, known, options, "timm") or forward
    changed = swin.other_methods(module, known, "forward", *(("_attn",) if options.attention else ()))
    try:
        reason = pieces.switched_off(options, *pieces.LAYER_PARTS) or changed or _reason(module, options)
    except AttributeError as error:
        reason = swin.missing_part(error, "timm")
    if reason is not None:
        return reason
    return partial(block_v2_forward if known.__module__ == _V2 else block_forward, options=options)


def _reason(block: nn.Module, options: Options) -> str | None:
    # AttributeError for what an older version keeps elsewhere
    _ = (block.drop_path1, block.drop_path2, block.norm1, block.norm2, block.mlp)
    if not options.attention:
        return None
    attn = block.attn
    known = pieces.known_class(attn, _ATTENTIONS)
    if known is None:
        return f"its attention is a {type(attn).__name__}"
    _ = (block.input_resolution, attn.proj_drop)
    if not isinstance(block.window_size, tuple) or not isinstance(block.shift_size, tuple):
        return "a version of timm that keeps the sizes of windows in another form"
    if getattr(attn, "qkv_bias_separate", False):
        return "it adds the bias of q, k, v apart from the product"
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return "its attention has hooks or another forward, which would no longer run"
    changed = swin.other_methods(attn, known, "forward")
    if changed or hasattr(attn, "logit_scale"):
        return changed
    return swin.table_reason(attn.relative_position_bias_table, attn.window_size, attn.num_heads)
