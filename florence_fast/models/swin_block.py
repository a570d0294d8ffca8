"""The shifted-window block of Swin (arXiv 2103.14030, section 3.2) and the stage made of it.

Parameters carry Microsoft's names: norm1, attn.{qkv,proj,relative_position_bias_table}, norm2, mlp.{fc1,fc2}.
B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from florence_fast import ops
from florence_fast.models.layers import (
    Mlp,
    add_branch,
    add_branch_and_norm,
    is_plain,
    layer_norm,
    linear,
    module_list,
    resize_bias_table,
)
from florence_fast.ops.windows import if_longer


class WindowAttention(nn.Module):
    """Attention inside (shifted) windows, with a learned bias for each relative position.

    ``pad_mode`` says what stands where the last windows stick out of the map. ``"mask"``: nothing (CoSwin).
    ``"bias"``: tokens that hold only the bias of qkv, and both axes stay unshifted when one fits into the window,
    which is what Microsoft's and Hugging Face's Swin compute.
    """

    def __init__(
        self, width: int, num_heads: int, window_size: int, *, shifted: bool, qkv_bias: bool, pad_mode: str
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shifted, self.pad_mode = num_heads, window_size, shifted, pad_mode
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        qkv = linear(self.qkv, x)  # (B, H, W, 3C)
        pads_are_tokens = self.pad_mode == "bias"
        shift = self.window_size // 2 if self.shifted else 0
        if pads_are_tokens:
            for side in x.shape[1:3]:
                shift = if_longer(shift, side, self.window_size)
        pad_token = None
        if pads_are_tokens:
            pad_token = qkv.new_zeros(qkv.shape[-1]) if self.qkv.bias is None else self.qkv.bias
        out = ops.window_attention(
            qkv,
            self.relative_position_bias_table,
            window_size=self.window_size,
            num_heads=self.num_heads,
            shift_size=shift,
            pad_mode=self.pad_mode,
            qkv_bias=pad_token,
        )
        return linear(self.proj, out)

    @torch.no_grad()
    def set_window_size(self, window_size: int) -> None:
        """Change the window, resizing the bias table bicubically; the present one keeps its table."""
        if window_size == self.window_size:
            return
        table = resize_bias_table(self.relative_position_bias_table, (window_size, window_size))
        self.relative_position_bias_table = nn.Parameter(table, self.relative_position_bias_table.requires_grad)
        self.window_size = window_size


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch under drop path."""

    def __init__(self, width: int, mlp_ratio: float, drop_path: float, attention: WindowAttention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(mlp_ratio * width))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x, branch = self.branches(x, layer_norm(self.norm1, x))
        return add_branch(x, branch, self.drop_path, self.training)

    def branches(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map behind the attention, and the branch of the MLP that is still to be added to it.

        Args:
            x: (B, H, W, C).
            normed: ``norm1`` of it.
        """
        branch = self.attn(normed)
        x, normed = add_branch_and_norm(x, branch, self.norm2, self.drop_path, self.training)
        return x, self.mlp(normed)


class Stage(nn.Module):
    """Blocks at one resolution, every second one shifted, and the merge that leads to the next stage."""

    def __init__(self, blocks: list[SwinBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = module_list(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on (B, H, W, C); the merge is the tower's to call, features are read before it."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x
        if not self.blocks or not is_plain(*self.blocks, kinds=(SwinBlock,)):
            for block in self.blocks:
                x = block(x)
            return x
        # What a block ends with and the next one begins with, a sum and its norm, are one pass over the map.
        normed = layer_norm(self.blocks[0].norm1, x)
        for block, following in pairwise(self.blocks):
            x, branch = block.branches(x, normed)
            x, normed = add_branch_and_norm(x, branch, following.norm1, block.drop_path, block.training)
        x, branch = self.blocks[-1].branches(x, normed)
        return add_branch(x, branch, self.blocks[-1].drop_path, self.blocks[-1].training)
