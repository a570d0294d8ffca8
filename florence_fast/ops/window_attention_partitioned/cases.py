"""Attention in windows that are cut out already, as Swin's own code computes it.

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Function, Inputs, Subject, generator


def setup(
    windows: int, masks: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Draw q, k, v, the bias (float32, as models keep it), a mask as a shift gives it, and the gradient."""
    draw, wide = generator(device, seed), torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=wide)

    tensors = {name: normal(windows, heads, tokens, head_dim).to(dtype) for name in ("q", "k", "v")}
    tensors["bias"] = normal(heads, tokens, tokens)
    region = torch.randint(2, (masks, tokens), generator=draw, device=device)
    mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).to(dtype)
    return Inputs(tensors, {"mask": mask}, normal(windows, heads, tokens, head_dim).to(dtype), {"mask": mask})


def setup_learnt_mask(dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Draw the same, the mask being a tensor that gets a gradient, and a scale."""
    inputs = setup(6, 3, 2, 13, 16, dtype, device, seed)
    tensors = inputs.tensors | {"mask": inputs.options["mask"] / 50}
    return Inputs(tensors, {"scale": 0.3}, inputs.grad_out)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, mask: Tensor) -> Tensor:
    """Do what Swin's code does: two products with a softmax between."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias.to(q.dtype)
    scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, mask: Tensor) -> Tensor:
    """Fold bias and mask into one additive mask, which every image of the batch shares."""
    added = (bias.to(q.dtype) + mask[:, None]).flatten(0, 1)
    q, k, v = (x.unflatten(0, (-1, len(mask))).flatten(1, 2) for x in (q, k, v))  # (B, M*h, N, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.expand(len(q), -1, -1, -1))
    return out.unflatten(1, (len(mask), -1)).flatten(0, 1)


def rival(function: Function) -> Callable[[Inputs], Function]:
    """Return ``build(inputs)`` for a function that takes what ``setup`` prepared."""
    return lambda inputs: functools.partial(function, **inputs.prepared)


def case(name: str, *sizes: int) -> Case:
    """Name a shape: windows, masks, heads, tokens and head dim."""
    return Case(name, functools.partial(setup, *sizes))


SUBJECT = Subject(
    op="window_attention_partitioned",
    checked=(case("7x7", 32, 16, 3, 49, 32), case("12x12", 8, 4, 2, 144, 32)),
    timed={
        "cpu": case("Swin-T stage 1, 8 images", 512, 64, 3, 49, 32),
        "cuda": case("Swin-T stage 1, 128 images", 8192, 64, 3, 49, 32),
    },
    rivals={"eager": rival(eager), "sdpa": rival(sdpa)},
    small=(
        case("masked", 8, 4, 2, 13, 16),
        case("masked", 8, 4, 2, 13, 16).given("neither", bias=None, mask=None),
        Case("a mask that learns", setup_learnt_mask),
    ),
    empty=case("no windows", 0, 4, 2, 13, 16),
    autocast=("q", "k", "v"),
)
SUBJECTS = {"window_attention_partitioned": SUBJECT}
