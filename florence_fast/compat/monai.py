"""MONAI's Swin, 2-D and 3-D, as inside SwinUNETR, on `florence_fast.ops`.

MONAI itself is not imported: layers are known by module and name of their class. Windows shrink to a small map, with a
bias of their own (`_swin_block.shrunken`). The mask that MONAI's stage computes for its blocks is not read: the op
knows it. Only the blocks are swapped, so that ``use_flash_attention`` has no effect on them; PatchMerging of MONAI
takes other neighbours together (``merging``), or eight of them (``mergingv2``), for which there is no op.

B batch · D H W map depth, height and width · C channels · h heads
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from florence_fast.compat import _swin_block as swin
from florence_fast.compat import pieces
from florence_fast.compat.options import Options

_NETS = "monai.networks.nets.swin_unetr"
BLOCKS = {(_NETS, "SwinTransformerBlock")}
LOOKS_FOR = "MONAI's SwinTransformerBlock"


def block_forward(block: nn.Module, x: Tensor, mask_matrix: Tensor | None, *, options: Options) -> Tensor:
    """Stand in for SwinTransformerBlock.forward: (B, [D,] H, W, C) to the same."""
    if swin.is_traced(x):
        return type(block).forward(block, x, mask_matrix)
    again = partial(checkpoint, use_reentrant=False) if block.use_checkpoint else _call
    branch = again(_first_part, block, x, mask_matrix, options)
    return again(_second_part, block, x, branch, options)


FORWARDS = {block_forward}


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
    known = pieces.known_class(module, BLOCKS)
    return None if known is None else f"MONAI {known.__name__}"


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a layer with a ``kind``, or the reason why none can."""
    known = pieces.known_class(module, BLOCKS)
    if not (options.attention or options.mlp or options.norm):
        return swin.NOTHING_ASKED
    changed = swin.other_methods(module, known, "forward", "forward_part1", "forward_part2")
    try:
        reason = changed or _attention_reason(module)
    except AttributeError as error:
        reason = swin.missing_part(error, "MONAI")
    return partial(block_forward, options=options) if reason is None else reason


def _attention_reason(block: nn.Module) -> str | None:
    attn = block.attn
    _ = (block.use_checkpoint, block.norm1, block.norm2, block.drop_path, block.mlp)
    _ = (attn.qkv, attn.proj, attn.proj_drop, attn.relative_position_index)
    known = pieces.known_class(attn, {(_NETS, "WindowAttention")})
    if known is None:
        return f"its attention is a {type(attn).__name__}"
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return "its attention has hooks or another forward, which would no longer run"
    reason = swin.other_methods(attn, known, "forward")
    return reason or swin.table_reason(attn.relative_position_bias_table, attn.window_size, attn.num_heads)
