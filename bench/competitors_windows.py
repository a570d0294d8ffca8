"""What others compute attention in windows with: FlexAttention, xformers, flash-window-attention-v2.

Each is written for windows that are cut out. On maps they get what a model has around them: partition and reverse,
the bias gathered from its table, which torch.compile may fuse for FlexAttention and nobody for the others.

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.competitors import Build, Rival, compiled, field, found, library, needs_gpu
from bench.session import Built, Missing, Plan
from florence_fast.ops.cases import Function, Inputs
from florence_fast.ops.window_attention.cases import gathered_bias
from florence_fast.ops.windows import crop, merge, partition

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B*M, h, N, d) and the bias (h, N, N) to (B*M, h, N, d)."""

SLOW_TO_BUILD = ("torch.compile", "flex_attention", "sdpa + mask, torch.compile", "torch.compile max-autotune")


def window_field(op: str, rivals: dict[str, Rival], others: dict[str, Build] | None = None) -> dict[str, Build]:
    """Return the competitors of an op on windows; ``rivals`` has "eager" and "sdpa", ``others`` what fits it alone."""
    more = {
        "sdpa + mask": library(rivals["sdpa"]),
        "xformers": xformers,
        "flex_attention": flex,
        "sdpa + mask, torch.compile": compiled(rivals["sdpa"], rehearsed=False),
        **(others or {}),
    }
    return field(op, rivals["eager"], more)


def around(inputs: Inputs, attend: Attend) -> Function:
    """Return a function of the op's tensors that calls ``attend`` on windows."""
    if "cut" not in inputs.prepared:
        return attend
    cut, num_heads, index = (inputs.prepared[name] for name in ("cut", "num_heads", "index"))

    def run(qkv: Tensor, rel_pos_bias_table: Tensor) -> Tensor:
        q, k, v = partition(qkv, cut, 3, num_heads, qkv.dtype)
        bias = gathered_bias(rel_pos_bias_table, index, cut).contiguous()
        return crop(merge(attend(q, k, v, bias)[None], cut, qkv.dtype), cut)

    return run


def sizes(inputs: Inputs) -> tuple[int, int]:
    """Return how many windows all maps have, and how many tokens a window has."""
    if "cut" not in inputs.prepared:
        q = inputs.tensors["q"]
        return q.shape[0], q.shape[2]
    cut = inputs.prepared["cut"]
    return len(inputs.tensors["qkv"]) * cut.num_windows, cut.num_tokens


def flex(inputs: Inputs, plan: Plan) -> Built:
    """Compile FlexAttention: the bias as its score_mod, the shift as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, (windows, tokens), block_mask = inputs.prepared["mask"], sizes(inputs), None
    if mask is not None:
        seen = mask == 0  # (M, N, N)
        block_mask = create_block_mask(
            lambda b, h, i, j: seen[b % len(seen), i, j], windows, None, tokens, tokens, device=inputs.device
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i, j], block_mask=block_mask)

    run = around(inputs, attend)
    if inputs.device.type == "cuda":
        return Built(torch.compile(run, dynamic=False))
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return Built(run, forward_only="FlexAttention has no backward on a CPU")


def xformers(inputs: Inputs, plan: Plan) -> Built:
    """Give xformers bias and mask as one tensor, whose rows it wants to begin at multiples of 8 elements."""
    attention = found("xformers", "ops.memory_efficient_attention")
    needs_gpu(inputs)
    mask = inputs.prepared["mask"]
    masks = 1 if mask is None else len(mask)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        heads, tokens = bias.shape[:2]
        added = bias.to(q.dtype)[None] if mask is None else bias.to(q.dtype) + mask[:, None]
        added = F.pad(added, (0, -tokens % 8))[..., :tokens].flatten(0, 1)  # (M*h, N, N)
        # Windows of a map are heads, so that the images of a batch share bias and mask: (B, N, M*h, d).
        q, k, v = (x.unflatten(0, (-1, masks)).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, attn_bias=added.expand(len(q), -1, -1, -1))
        return out.transpose(1, 2).unflatten(1, (masks, heads)).flatten(0, 1)

    return Built(around(inputs, attend))


def flash_window_attention_v2(inputs: Inputs, plan: Plan) -> Built:
    """Call the public kernel for Swin V2's attention, which multiplies cosines and nothing else, in 16 bits."""
    attention = found("flash_win_attn_v2", "flash_window_attention_v2.flash_win_attn_v2")
    needs_gpu(inputs)
    if inputs.tensors["qkv"].dtype == torch.float32:
        raise Missing("takes float16 and bfloat16 only")

    def run(qkv: Tensor, rel_pos_bias_table: Tensor, logit_scale: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            scale = logit_scale.to(q.dtype).view(-1, 1, 1)
            return attention(q, k, v, scale, bias.to(q.dtype), inputs.prepared["mask"])

        return around(inputs, attend)(qkv, rel_pos_bias_table)

    return Built(run)
