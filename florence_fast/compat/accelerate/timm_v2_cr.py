"""timm's other Swin V2 (timm.models.swin_transformer_v2_cr) on `florence_fast.ops`; `timm` has the first one.

What differs: the network that makes the position biases is called for every pair of tokens of a window, and in training
drops hidden units pair by pair, so that there a bias is no longer one of an offset; it is added without a sigmoid;
q, k and v have plain biases; a third norm may end a block. Windows and shift are settled by the size for which the
model was made, or by ``set_input_size``.

B batch · H W map height and width · C channels · h heads · N tokens in one window
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

_MODELS = "timm.models.swin_transformer_v2_cr"
BLOCKS = {(_MODELS, "SwinTransformerV2CrBlock")}
MERGINGS = {(_MODELS, "PatchMerging")}
LOOKS_FOR = "timm's SwinTransformerV2CrBlock"


def block_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerV2CrBlock.forward, whose norms come after the branches: (B, H, W, C) to the same."""
    if swin.is_traced(x):
        return type(block).forward(block, x)
    branch = _attention(block, x, options)
    x = x + block.drop_path1(pieces.norm(block.norm1, branch, options))
    tokens = x.flatten(1, 2)  # as their MLP and norms see them
    branch = pieces.norm(block.norm2, swin.mlp(block.mlp, tokens, options), options)
    _, tokens = swin.add_and_norm(tokens, branch, block.drop_path2, block.norm3, options)
    return tokens.unflatten(1, x.shape[1:3])


def merging_forward(merging: nn.Module, x: Tensor) -> Tensor:
    """Stand in for PatchMerging.forward: (B, H, W, C) to (B, H/2, W/2, 2C)."""
    merged = None if swin.is_traced(x) else merges.norm_then_reduce(merging, x)
    return type(merging).forward(merging, x) if merged is None else merged


FORWARDS = {block_forward, merging_forward}


def _attention(block: nn.Module, x: Tensor, options: Options) -> Tensor:
    if not options.attention or _needs_own_attention(block, x.shape[1:3]):
        return block._shifted_window_attn(x)
    attn = block.attn
    table, bias = _position_bias(attn)
    sizes = {"window": block.window_size, "shift": block.shift_size, "num_heads": attn.num_heads, "rolls_first": True}
    x = swin.attend(x, attn.qkv, table, bias=bias, logit_scale=attn.logit_scale, **sizes)
    return attn.proj_drop(pieces.linear(attn.proj, x))


def _position_bias(attn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Give the biases as a table of offsets, or those of every pair (h, N, N) if one offset may have several."""
    network = attn.meta_mlp
    parts = list(network.modules())
    drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts)
    if drops or not swin.untouched(*parts):
        return None, attn._relative_positional_encodings()[0]
    return network(_offsets(attn)), None


def _offsets(attn: nn.Module) -> Tensor:
    """Pick a pair for each offset, in the order of a bias table, and give its coordinates: (offsets, 2)."""
    height, width = attn.window_size
    pairs = attn.relative_coordinates_log.view(height, width, height, width, 2)
    down = torch.arange(1 - height, height, device=pairs.device)[:, None]
    right = torch.arange(1 - width, width, device=pairs.device)
    # the query stands below and right of the key by the offset, one of them at the window's first row and column
    return pairs[down.clamp(min=0), right.clamp(min=0), (-down).clamp(min=0), (-right).clamp(min=0)].flatten(0, 1)


def _needs_own_attention(block: nn.Module, size: tuple[int, int]) -> bool:
    """Say whether the op would not compute the same as the block's own ``_shifted_window_attn``."""
    attn = block.attn
    if swin.drops_attention(attn.attn_drop.p, attn.training, "timm's attn_drop"):
        return True
    if not swin.untouched(attn, attn.attn_drop, attn.qkv, attn.proj):
        return True
    if tuple(size) != tuple(block.feat_size) and not getattr(block, "dynamic_mask", False):
        return True  # neither their mask nor, in old releases, their way back from the windows is for this map
    return swin.one_window_is_shifted(size, block.window_size, block.shift_size)


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    return None if known is None else f"timm {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    if (known.__module__, known.__name__) in MERGINGS:
        return swin.merging_reason(module, known, options, "timm") or merging_forward
    changed = swin.other_methods(module, known, "forward", *(("_shifted_window_attn",) if options.attention else ()))
    try:
        reason = pieces.switched_off(options, *pieces.LAYER_PARTS) or changed or _reason(module, options)
    except AttributeError as error:
        reason = swin.missing_part(error, "timm")
    return partial(block_forward, options=options) if reason is None else reason


def _reason(block: nn.Module, options: Options) -> str | None:
    # AttributeError for what another version keeps elsewhere
    _ = (block.drop_path1, block.drop_path2, block.norm1, block.norm2, block.norm3, block.mlp)
    if not options.attention:
        return None
    attn = block.attn
    known = pieces.known_class(attn, {(_MODELS, "WindowMultiHeadAttention")})
    if known is None:
        return f"its attention is a {type(attn).__name__}"
    _ = (block.feat_size, attn.meta_mlp, attn.logit_scale, attn.proj_drop, attn._relative_positional_encodings)
    if not isinstance(block.window_size, tuple) or not isinstance(block.shift_size, tuple):
        return "a version of timm that keeps the sizes of windows in another form"
    if attn.sequential_attn:
        return "it was asked for sequential attention"
    if not swin.untouched(attn, attn.attn_drop, attn.qkv, attn.proj):
        return "its attention has hooks or another forward, which would no longer run"
    tokens = block.window_size[0] * block.window_size[1]
    if tuple(attn.relative_coordinates_log.shape) != (tokens**2, 2):
        shape = tuple(attn.relative_coordinates_log.shape)
        return f"the coordinates must have shape {(tokens**2, 2)}, got {shape}"
    return swin.other_methods(attn, known, "forward", "_relative_positional_encodings")
