"""Microsoft's own Swin on `florence_fast.ops`: the module that Swin-Transformer, UniCL and hundreds of copies hold.

That code is no package, so a block is known by its parts: norm1, attn.{qkv, proj, relative_position_bias_table}, norm2,
mlp and sizes, under a forward that takes (B, H*W, C). There are two of them. The one for classification knows its map
(``input_resolution``) and its mask, and takes maps that the windows divide. The one for detection and segmentation is
told the map (``H`` and ``W``) and the mask by its stage, and fills up the last windows.

Parts can lie, so `replacement` tries a copy of the block, with other weights, on one random map: a block that computes
anything else than Swin's is left alone. Residual scales, cosines, a norm behind the branch show themselves so.

Switched off, the attention is the block's own, called on windows that we cut. `microsoft_merging` has the merges.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from florence_fast.compat.accelerate import pieces, their_attention
from florence_fast.compat.accelerate import swin_block as swin
from florence_fast.compat.accelerate.options import Options

LOOKS_FOR = "blocks laid out as Microsoft's SwinTransformerBlock"

_PARTS = ("norm1", "attn", "norm2", "mlp", "drop_path", "window_size", "shift_size")
_ATTENTION_PARTS = ("qkv", "proj", "relative_position_bias_table", "num_heads", "scale", "softmax", "attn_drop")
_CLOSE = 1e-3


def resolution_forward(block: nn.Module, x: Tensor, *, options: Options) -> Tensor:
    """Stand in for the forward of the block for classification: (B, H*W, C) to the same."""
    size = tuple(block.input_resolution)
    # what their windows do not divide, or a map of another size, is theirs to refuse
    fits = not swin.is_traced(x) and x.ndim == 3 and x.shape[1] == size[0] * size[1]
    if not fits or any(side % block.window_size for side in size) or _needs_own_forward(block, size, options):
        return type(block).forward(block, x)
    return _compute(block, x, size, getattr(block, "attn_mask", None), options)


def told_forward(block: nn.Module, x: Tensor, mask_matrix: Tensor | None, *, options: Options) -> Tensor:
    """Stand in for the forward of the block for detection: (B, H*W, C) to the same."""
    size = (block.H, block.W)
    fits = not swin.is_traced(x) and x.ndim == 3 and None not in size and x.shape[1] == size[0] * size[1]
    unmasked = block.shift_size > 0 and mask_matrix is None
    if not fits or unmasked or _needs_own_forward(block, size, options):
        return type(block).forward(block, x, mask_matrix)
    return _compute(block, x, size, mask_matrix, options)


FORWARDS = {resolution_forward, told_forward}


def _compute(block: nn.Module, x: Tensor, size: tuple[int, int], mask: Tensor | None, options: Options) -> Tensor:
    normed = pieces.norm(block.norm1, x, options).unflatten(1, size)
    branch = (_attend(block, normed) if options.attention else _own_attention_of(block, normed, mask)).flatten(1, 2)
    x, normed = swin.add_and_norm(x, branch, block.drop_path, block.norm2, options)
    return x + block.drop_path(swin.mlp(block.mlp, normed, options))


def _attend(block: nn.Module, x: Tensor) -> Tensor:
    """Map (B, H, W, C) to the same by the op."""
    attn = block.attn
    sizes = {"window": (block.window_size,) * 2, "shift": (block.shift_size,) * 2, "num_heads": attn.num_heads}
    x = swin.attend(x, attn.qkv, attn.relative_position_bias_table, scale=float(attn.scale), **sizes)
    x = pieces.linear(attn.proj, x)
    return attn.proj_drop(x) if hasattr(attn, "proj_drop") else x


def _own_attention_of(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Map (B, H, W, C) to the same by the block's own attention, under the mask that its shifted windows were given."""
    shift = block.shift_size
    attend = partial(block.attn, mask=mask if shift else None)
    return their_attention.through_windows(x, block.window_size, shift, attend)


def _needs_own_forward(block: nn.Module, size: tuple[int, int], options: Options) -> bool:
    """Say whether the op would not compute the same as the block itself."""
    if not options.attention:
        return False
    attn = block.attn
    if swin.drops_attention(attn.attn_drop.p, attn.training, "attn_drop"):
        return True
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return True
    return swin.one_window_is_shifted(size, (block.window_size,) * 2, (block.shift_size,) * 2)


def kind(module: nn.Module) -> str | None:
    """Name the layer if it has the parts of Microsoft's block; None if this file does not know it."""
    if is_of_a_library(module):
        return None
    attn = getattr(module, "attn", None)
    has_parts = all(hasattr(module, name) for name in _PARTS) and all(hasattr(attn, name) for name in _ATTENTION_PARTS)
    return f"Microsoft {type(module).__name__}" if has_parts else None


def is_of_a_library(module: nn.Module) -> bool:
    """Say whether another file knows the module, or it is ours."""
    library = type(module).__module__.split(".")[0]
    return library in ("timm", "torchvision", "monai", "transformers", "florence_fast")


def replacement(module: nn.Module, options: Options) -> Callable[..., Any] | str:
    """Give the forward that stands in for that of a block with a ``kind``, or the reason why none can."""
    unasked = pieces.switched_off(options, *pieces.LAYER_PARTS)
    if unasked is not None:
        return unasked
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) == 1 and hasattr(module, "input_resolution"):
        forward = partial(resolution_forward, options=options)
    elif len(arguments) == 2 and "mask" in arguments[1] and hasattr(module, "H") and hasattr(module, "W"):
        forward = partial(told_forward, options=options)
    else:
        return f"its forward takes {', '.join(arguments)}, and neither sizes nor masks are where Microsoft keeps them"
    return _reason(module, options) or _trial(module, forward) or forward


def _reason(block: nn.Module, options: Options) -> str | None:
    attn = block.attn
    if not isinstance(block.window_size, int) or not isinstance(block.shift_size, int):
        return "its windows are not square"
    if not options.attention:
        return None
    if not isinstance(attn.relative_position_bias_table, Tensor) or not isinstance(attn.qkv, nn.Module):
        return "its attention has no bias table, or no linear of q, k and v"
    if not swin.untouched(attn, attn.softmax, attn.attn_drop, attn.qkv, attn.proj):
        return "its attention has hooks or another forward, which would no longer run"
    return swin.table_reason(attn.relative_position_bias_table, (block.window_size,) * 2, attn.num_heads)


def _trial(block: nn.Module, forward: Callable[..., Any]) -> str | None:
    """Compare both forwards on one map; None if they agree."""
    if block.norm2.weight is None:
        return "it cannot be tried: its norm has no weights"
    inputs = partial(_trial_inputs, is_told=forward.func is told_forward)
    return trial(block, forward, inputs, "block")


def trial(
    module: nn.Module, forward: Callable[..., Any], inputs: Callable[..., tuple[Any, ...]], what: str
) -> str | None:
    """Compare both forwards of a copy with weights drawn anew; None if they agree.

    ``inputs`` makes what both are called with, from the copy and a generator of random numbers.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return "it cannot be tried: its weights are on the meta device"
    try:
        twin = copy.deepcopy(module).eval().requires_grad_(False).to("cpu", torch.float32)
        twin.__dict__.pop("forward", None)
        generator = torch.Generator().manual_seed(0)
        for parameter in twin.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(fan_in, 9) ** -0.5)
        arguments = inputs(twin, generator)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            theirs = type(twin).forward(twin, *arguments)
            ours = forward(twin, *arguments)
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return f"its forward returns something else than the {what} of Microsoft's"
    except Exception as error:  # whatever somebody's module raises
        return f"it could not be tried: {type(error).__name__}: {error}"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if error <= _CLOSE:
        return None
    return f"it has the parts of Microsoft's {what} and computes something else"


def _trial_inputs(block: nn.Module, generator: torch.Generator, is_told: bool) -> tuple[Any, ...]:
    channels = block.norm2.weight.shape[-1]
    if not is_told:
        height, width = block.input_resolution
        return (torch.randn(1, height * width, channels, generator=generator),)
    window, shift = block.window_size, block.shift_size
    block.H, block.W = 2 * window - 1, window + 1
    x = torch.randn(1, block.H * block.W, channels, generator=generator)
    return x, their_attention.shift_mask(x.unflatten(1, (block.H, block.W)), window, shift)
