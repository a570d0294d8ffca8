"""MONAI's Swin, 2-D and 3-D, as inside SwinUNETR, on `florence_fast.ops`.

MONAI itself is not imported: layers are known by module and name of their class. Windows shrink to a small map, with a
bias of their own (`swin_block.shrunken`). The mask that MONAI's stage computes for its blocks is not read: the op
knows it. ``use_flash_attention`` has no effect on blocks that are swapped. Where the attention is their own, so is the
norm before it: one method of theirs computes both.

The merges of MONAI lay the eight tokens of a cell in 3-D side by side in orders that differ from one to the other and
from release to release; the older one used to take two tokens twice and two not at all. Weights are trained for one of
these, so a merge's own forward is asked which it is.

B batch · D H W map depth, height and width · C channels · h heads
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from florence_fast.compat.accelerate import merges, pieces
from florence_fast.compat.accelerate import swin_block as swin
from florence_fast.compat.accelerate.options import Options

_NETS = "monai.networks.nets.swin_unetr"
BLOCKS = {(_NETS, "SwinTransformerBlock")}
MERGINGS = {(_NETS, "PatchMerging"), (_NETS, "PatchMergingV2")}
LOOKS_FOR = "MONAI's SwinTransformerBlock, PatchMerging, PatchMergingV2"


def block_forward(block: nn.Module, x: Tensor, mask_matrix: Tensor | None, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerBlock.forward: (B, [D,] H, W, C) to the same."""
    if swin.is_traced(x):
        return type(block).forward(block, x, mask_matrix)
    again = partial(checkpoint, use_reentrant=False) if block.use_checkpoint else _call
    branch = again(_first_part, block, x, mask_matrix, options)
    return again(_second_part, block, x, branch, options)


def merging_forward(merging: nn.Module, x: Tensor, *, corners: tuple[tuple[int, ...], ...]) -> Tensor:
    """Stand in for PatchMerging.forward and PatchMergingV2.forward: (B, [D,] H, W, C) to ([D/2,] H/2, W/2, 2C)."""
    merged = None
    if not swin.is_traced(x) and x.ndim == len(corners[0]) + 2:
        merged = merges.norm_then_reduce(merging, x, corners)
    return type(merging).forward(merging, x) if merged is None else merged


FORWARDS = {block_forward, merging_forward}


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _first_part(block: nn.Module, x: Tensor, mask_matrix: Tensor | None, options: Options) -> Tensor:
    if not options.attention or _needs_own_attention(block, x, mask_matrix):
        return block.forward_part1(x, mask_matrix)
    attn = block.attn
    x = pieces.norm(block.norm1, x, options)
    window, shift, bias = swin.shrunken(x.shape[1:-1], block.window_size, block.shift_size, attn)
    table = attn.relative_position_bias_table if bias is None else None
    sizes = {"window": window, "shift": shift, "num_heads": attn.num_heads, "scale": attn.scale}
    return attn.proj_drop(pieces.linear(attn.proj, swin.attend(x, attn.qkv, table, bias=bias, **sizes)))


def _second_part(block: nn.Module, x: Tensor, branch: Tensor, options: Options) -> Tensor:
    x, normed = swin.add_and_norm(x, branch, block.drop_path, block.norm2, options)
    return x + block.drop_path(swin.mlp(block.mlp, normed, options))


def _needs_own_attention(block: nn.Module, x: Tensor, mask_matrix: Tensor | None) -> bool:
    """Say whether the op would not compute the same as the block's own ``forward_part1``."""
    attn = block.attn
    # their faster path, without gradients, drops no weights even in training
    if swin.drops_attention(attn.attn_drop.p, attn.training, "MONAI's attn_drop_rate"):
        return True
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return True
    pairs = zip(x.shape[1:-1], block.window_size, block.shift_size, strict=True)
    return mask_matrix is None and any(by > 0 and side > window for side, window, by in pairs)


def kind(module: nn.Module) -> str | None:
    """Name the layer that ``module`` is, or a subclass of; None if this file does not know it."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    return None if known is None else f"MONAI {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    known = pieces.known_class(module, BLOCKS | MERGINGS)
    if (known.__module__, known.__name__) in MERGINGS:
        return swin.merging_reason(module, known, options, "MONAI") or _merging_replacement(module)
    replaced = ("forward", "forward_part2", *(("forward_part1",) if options.attention else ()))
    changed = swin.other_methods(module, known, *replaced)
    try:
        reason = pieces.switched_off(options, *pieces.LAYER_PARTS) or changed or _reason(module, options)
    except AttributeError as error:
        reason = swin.missing_part(error, "MONAI")
    return partial(block_forward, options=options) if reason is None else reason


def _merging_replacement(merging: nn.Module) -> Callable[..., Any] | str:
    """Ask a merge which token of a cell its forward puts where, by a cell of numbered tokens of one channel."""
    axes = 3 if merging.reduction.in_features == 8 * merging.dim else 2
    twin = copy.copy(merging)
    twin.__dict__["_modules"] = {"norm": nn.Identity(), "reduction": nn.Identity()}
    cell = torch.arange(2.0**axes, device="cpu").view(1, *[2] * axes, 1)
    try:
        merged = type(merging).forward(twin, cell)
        places = merged.flatten().int().tolist()
        wrong = None if merged.shape == (1,) * (axes + 1) + (2**axes,) else f"it gave {tuple(merged.shape)}"
    except Exception as error:  # whatever another version makes of it
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        return f"a version of MONAI whose merge could not be asked for its order: {wrong}"
    corners = tuple(itertools.product((0, 1), repeat=axes))
    return partial(merging_forward, corners=tuple(corners[place] for place in places))


def _reason(block: nn.Module, options: Options) -> str | None:
    _ = (block.use_checkpoint, block.norm1, block.norm2, block.drop_path, block.mlp)
    if not options.attention:
        return None
    attn = block.attn
    _ = (attn.qkv, attn.proj, attn.proj_drop, attn.relative_position_index)
    known = pieces.known_class(attn, {(_NETS, "WindowAttention")})
    if known is None:
        return f"its attention is a {type(attn).__name__}"
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return "its attention has hooks or another forward, which would no longer run"
    reason = swin.other_methods(attn, known, "forward")
    return reason or swin.table_reason(attn.relative_position_bias_table, attn.window_size, attn.num_heads)
