"""Window attention at the stages of the paper's models, beside everything that computes the same.

Letters: B batch · H W map height and width · C channels · M windows of one map · N tokens in one window · h heads ·
d head dim.
"""

import warnings

import torch
from torch import Tensor

from bench.competitors import compiled, library, ours
from bench.session import Built, Plan
from florence_fast.ops._windows import crop, merge, partition
from florence_fast.verify.cases import Inputs
from florence_fast.verify.window_attention import SUBJECT, Shape, gathered_bias, setup

__all__ = [
    "COMPETITORS",
    "OP",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "units",
]

OP = "window_attention"
# The most valuable first: a run may be cut short.
SHAPES = {
    "swin_t_stage1_224": Shape(128, 56, 56, 3),
    "coswin_h_stage3_224": Shape(64, 14, 14, 32),
    "swin_b_stage1_384_window12": Shape(32, 96, 96, 4, window=12, shift=6),
    "coswin_h_stage1_224": Shape(64, 56, 56, 8),
    "swin_t_stage2_224": Shape(128, 28, 28, 6),
    "swin_t_stage3_224": Shape(128, 14, 14, 12),
    "swin_t_stage4_224": Shape(128, 7, 7, 24, shift=0),
    "coswin_h_stage2_224": Shape(64, 28, 28, 16),
    "swin_b_stage3_384_window12": Shape(32, 24, 24, 16, window=12, shift=6),
    "coswin_h_stage3_384": Shape(32, 24, 24, 32),
    "swin_t_stage1_224_unshifted": Shape(128, 56, 56, 3, shift=0),
    "ragged_200x304": Shape(16, 50, 76, 3),
}
REHEARSAL = {
    "tiny_shifted": Shape(1, 14, 14, 1, head_dim=16),
    "tiny_ragged": Shape(1, 7, 9, 1, head_dim=16),
}


# Each token's q, k, v and its result pass through memory once: 3C read and C written. The backward reads qkv and the
# gradient of the result and writes that of qkv: 7C. Table and windows' statistics are under a percent and left out.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 4, "backward": 7, "both": 11}[mode]
    return shape.batch * shape.height * shape.width * shape.heads * shape.head_dim * streams * dtype.itemsize


# q k^T and p v, 2 N^2 d each; the backward has a product for each of dp, dv, dq, dk. Recomputing counts for nothing.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 2, "backward": 4, "both": 6}[mode]
    return units(shape) * products * 2 * shape.cut.num_tokens**2 * shape.head_dim


def units(shape: Shape) -> int:
    """Return the number of windows times heads: what the static budget counts its clocks for."""
    return shape.batch * shape.cut.num_windows * shape.heads


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    directions = ["forward", "backward"] if mode == "both" else [mode]
    shifted = " shifted" if shape.shift else ""
    side = f"{shape.window}x{shape.window}"
    return [f"{side} d{shape.head_dim} {dtype} {direction}{shifted}" for direction in directions]


def flex(inputs: Inputs, plan: Plan) -> Built:
    """Compile FlexAttention: the bias as its score_mod, the shift as its block mask, partition and reverse fused."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_gpu = inputs.grad_out.device.type == "cuda"
    cut, num_heads, index, mask = (inputs.prepared[name] for name in ("cut", "num_heads", "index", "mask"))
    batch, tokens, block_mask = len(inputs.grad_out), cut.num_tokens, None
    if mask is not None:
        seen = mask == 0  # (M, N, N)
        block_mask = create_block_mask(
            lambda b, h, i, j: seen[b % cut.num_windows, i, j],
            batch * cut.num_windows, None, tokens, tokens, device=inputs.grad_out.device,
        )  # fmt: skip

    def run(qkv: Tensor, rel_pos_bias_table: Tensor) -> Tensor:
        q, k, v = partition(qkv, cut, 3, num_heads, qkv.dtype)
        bias = gathered_bias(rel_pos_bias_table, index, cut).contiguous()
        out = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i, j], block_mask=block_mask)
        return crop(merge(out[None], cut, qkv.dtype), cut)

    if on_gpu:
        return Built(torch.compile(run, dynamic=False))
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return Built(run, forward_only="FlexAttention has no backward on a CPU")


COMPETITORS = {
    "ours (triton)": ours(OP, "triton"),
    "eager": library(SUBJECT.rivals["eager"]),
    "sdpa + mask": library(SUBJECT.rivals["sdpa"]),
    "ours (torch)": ours(OP, "torch"),
    "torch.compile": compiled(SUBJECT.rivals["eager"]),
    "flex_attention": flex,
    "torch.compile max-autotune": compiled(SUBJECT.rivals["eager"], "max-autotune-no-cudagraphs"),
}
SLOW_TO_BUILD = ("torch.compile", "flex_attention", "torch.compile max-autotune")
