"""Window attention as two libraries of Swin models have it: MONAI's, and Microsoft's with its fused window process.

Both take a block's windows apart before the projection to q, k and v, and here behind it, as all competitors do.

Letters: B batch · M windows of one map · N tokens in one window · C channels · h heads · d head dim.
"""

import inspect
import math
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.competitors import found, needs_gpu
from bench.session import Built, Missing, Plan
from florence_fast.ops.cases import Inputs
from florence_fast.ops.window_attention.cases import gathered_bias
from florence_fast.ops.windows import Cut, crop


class _Given(nn.Module):
    """Stands in the place of a projection, whose result is there already."""

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def monai(inputs: Inputs, plan: Plan) -> Built:
    """Call SwinUNETR's window attention with the option by which it goes through scaled_dot_product_attention."""
    attention_class = found("monai", "networks.nets.swin_unetr.WindowAttention")
    partition, reverse = (
        found("monai", f"networks.nets.swin_unetr.window_{name}") for name in ("partition", "reverse")
    )
    if "use_flash_attention" not in inspect.signature(attention_class).parameters:
        raise Missing("this monai has no use_flash_attention in SwinUNETR: 1.6 or newer is needed")
    qkv, table = (inputs.tensors[name] for name in ("qkv", "rel_pos_bias_table"))
    cut, heads = inputs.prepared["cut"], inputs.prepared["num_heads"]
    if len(table) != math.prod(2 * side - 1 for side in cut.window):
        raise Missing("numbers the pairs of a window that is larger than the map in another way")
    attention = attention_class(qkv.shape[-1] // 3, heads, cut.window, use_flash_attention=True).to(qkv.device).eval()
    attention.qkv, attention.proj = _Given(), nn.Identity()
    del attention.relative_position_bias_table  # a parameter; here it is a tensor of the call
    axes = tuple(range(1, len(cut.size) + 1))
    pads = tuple(chain(*((0, p - s) for p, s in zip(reversed(cut.padded), reversed(cut.size), strict=True))))

    def run(qkv: Tensor, rel_pos_bias_table: Tensor) -> Tensor:
        x = F.pad(qkv, (0, 0, *pads)) if any(pads) else qkv
        x = x.roll([-s for s in cut.shift], axes) if any(cut.shift) else x
        windows = partition(x, cut.window)  # (B*M, N, 3C)
        attention.qkv.given, attention.relative_position_bias_table = windows, rel_pos_bias_table
        out = attention(windows[..., : qkv.shape[-1] // 3], inputs.prepared["mask"])
        out = reverse(out.view(-1, *cut.window, out.shape[-1]), cut.window, [len(qkv), *cut.padded])
        return crop(out.roll(cut.shift, axes) if any(cut.shift) else out, cut)

    return Built(run, forward_only="with a gradient MONAI takes its plain path, which is eager's")


def window_process(inputs: Inputs, plan: Plan) -> Built:
    """Call Microsoft's CUDA kernels for roll and partition in one, with the plain attention of its code between."""
    apart, together = (_in_one(name) for name in ("roll_and_window_partition", "window_merge_and_roll"))
    needs_gpu(inputs)
    cut, heads, index = (inputs.prepared[name] for name in ("cut", "num_heads", "index"))
    mask, reason = inputs.prepared["mask"], _against_window_process(cut, inputs.tensors["qkv"].dtype)
    if reason is not None:
        raise Missing(reason)
    side, shift = cut.window[0], cut.shift[0]

    def run(qkv: Tensor, rel_pos_bias_table: Tensor) -> Tensor:
        *place, channels = qkv.shape
        windows = apart.apply(qkv, *place, channels, -shift, side)  # (B*M, side, side, 3C)
        q, k, v = windows.view(len(windows), side**2, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B*M, h, N, d)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + gathered_bias(rel_pos_bias_table, index, cut).to(qkv.dtype)
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(windows), side, side, channels // 3)
        return together.apply(out, *place, channels // 3, shift, side)

    return Built(run)


def _in_one(name: str) -> type[torch.autograd.Function]:
    """Join the two functions of the extension for one direction."""
    forward, backward = (found("swin_window_process", f"{name}_{way}") for way in ("forward", "backward"))

    class InOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *sizes: int) -> Tensor:
            ctx.sizes = sizes
            return forward(x, *sizes)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return backward(grad.contiguous(), *ctx.sizes), *(None for _ in ctx.sizes)

    return InOne


def _against_window_process(cut: Cut, dtype: torch.dtype) -> str | None:
    """Say why the extension cannot take a map; it checks nothing itself."""
    if not any(cut.shift):
        return "its code has nothing to fuse where windows are not shifted"
    if len(cut.size) != 2 or len({*cut.window}) > 1 or len({*cut.shift}) > 1:
        return "takes square windows in 2-D only"
    if cut.padded != cut.size:
        return "takes maps only that the window divides"
    # It puts the windows of a row as far apart as those of a column.
    if len({*cut.size}) > 1:
        return "takes square maps only"
    return None if dtype in (torch.float16, torch.float32) else "takes float16 and float32 only"
