"""Window attention as models without this package compute it, and the sizes that verification takes.

Letters: B batch · H W map height and width · C channels · M windows of one map · N tokens in one window · h heads ·
d head dim.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Function, Inputs, Subject, generator
from florence_fast.ops.windows import MAX_LOG_SCALE, Cut, blocked_pairs, crop, cut_map, merge, offset_index, partition


@dataclass(frozen=True)
class Shape:
    """One call of a Swin block's attention."""

    batch: int
    height: int
    width: int
    heads: int
    window: int = 7
    shift: int = 3
    head_dim: int = 32

    @property
    def size(self) -> tuple[int, ...]:
        return self.height, self.width

    @property
    def window_size(self) -> tuple[int, ...]:
        return (self.window,) * 2

    @property
    def cut(self) -> Cut:
        return cut_map(self.size, self.window_size, (self.shift,) * 2)


@dataclass(frozen=True)
class Shape3d:
    """The same on maps that have frames, or on volumes."""

    batch: int
    frames: int
    height: int
    width: int
    heads: int
    window: tuple[int, int, int] = (8, 7, 7)
    shift: tuple[int, int, int] = (4, 3, 3)
    head_dim: int = 32

    @property
    def size(self) -> tuple[int, ...]:
        return self.frames, self.height, self.width

    @property
    def window_size(self) -> tuple[int, ...]:
        return self.window

    @property
    def cut(self) -> Cut:
        return cut_map(self.size, self.window, self.shift)


def setup(shape: Shape | Shape3d, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw qkv, the bias table (float32, as models keep it) and the gradient; prepare what a model keeps."""
    draw = generator(device, seed)
    size, channels, cut = (shape.batch, *shape.size), shape.heads * shape.head_dim, shape.cut
    wide = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(*size, 3 * channels, generator=draw, device=device, dtype=wide).to(dtype)
    offsets = math.prod(2 * side - 1 for side in shape.window_size)
    table = torch.randn(offsets, shape.heads, generator=draw, device=device, dtype=wide)
    grad_out = torch.randn(*size, channels, generator=draw, device=device, dtype=wide).to(dtype)
    blocked = blocked_pairs(cut, (False,) * len(cut.size), True, qkv.device)
    mask = None
    if blocked is not None:
        mask = torch.zeros(blocked.shape, dtype=dtype, device=device).masked_fill_(blocked, -torch.inf)
    prepared = {
        "cut": cut,
        "num_heads": shape.heads,
        "index": offset_index(cut.window, shape.window_size, qkv.device),
        "mask": mask,
    }
    options = {"window_size": shape.window, "num_heads": shape.heads, "shift_size": shape.shift}
    return Inputs({"qkv": qkv, "rel_pos_bias_table": table}, options, grad_out, prepared)


def setup_cosine(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the same and the logarithm of a factor for each head, with which Swin V2 multiplies cosines."""
    inputs = setup(shape, dtype, device, seed)
    inputs.tensors["logit_scale"] = torch.linspace(1.5, 3.0, shape.heads, device=device).to(
        torch.promote_types(dtype, torch.float32)
    )
    return inputs


def setup_every_option(dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Draw what the other form takes: a bias in place of a table, cosines, pads that are ``qkv_bias``, a ring."""
    draw = generator(device, seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=wide)

    tensors = {
        "qkv": normal(2, 7, 9, 96).to(dtype),
        "bias": normal(2, 12, 12),
        "logit_scale": normal(2, 1, 1),
        "qkv_bias": normal(96),
    }
    options = {"window_size": (4, 3), "num_heads": 2, "shift_size": (2, 1), "pad_mode": "bias", "cyclic": (False, True)}
    return Inputs(tensors, options, normal(2, 7, 9, 32).to(dtype))


def eager(
    qkv: Tensor, rel_pos_bias_table: Tensor, *, cut: Cut, num_heads: int, index: Tensor, mask: Tensor | None
) -> Tensor:
    """Do what Swin's code does: pad, roll, partition, two products with a softmax between, reverse, roll back."""
    q, k, v = partition(qkv, cut, 3, num_heads, qkv.dtype)  # (B*M, h, N, d)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = scores + gathered_bias(rel_pos_bias_table, index, cut).to(scores.dtype)
    if mask is not None:
        scores = (scores.unflatten(0, (-1, cut.num_windows)) + mask[:, None]).flatten(0, 1)
    return crop(merge((scores.softmax(-1) @ v)[None], cut, qkv.dtype), cut)


def sdpa(
    qkv: Tensor, rel_pos_bias_table: Tensor, *, cut: Cut, num_heads: int, index: Tensor, mask: Tensor | None
) -> Tensor:
    """Fold bias and mask into one additive mask (M*h, N, N), which every image of the batch shares."""
    q, k, v = (
        x.unflatten(0, (-1, cut.num_windows)).flatten(1, 2) for x in partition(qkv, cut, 3, num_heads, qkv.dtype)
    )  # (B, M*h, N, d)
    added = gathered_bias(rel_pos_bias_table, index, cut).to(qkv.dtype)
    added = added.expand(cut.num_windows, -1, -1, -1) if mask is None else added + mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.flatten(0, 1).expand(len(q), -1, -1, -1))
    out = out.unflatten(1, (cut.num_windows, num_heads)).flatten(0, 1)
    return crop(merge(out[None], cut, qkv.dtype), cut)


def _unit(qkv: Tensor, logit_scale: Tensor, num_heads: int) -> Tensor:
    """Scale q and k so that attention of head dim d multiplies cosines by exp of ``logit_scale``."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    factor = logit_scale.clamp(max=MAX_LOG_SCALE).exp().to(qkv.dtype) * q.shape[-1] ** 0.5
    return torch.stack((F.normalize(q, dim=-1) * factor[:, None], F.normalize(k, dim=-1), v), -3).flatten(-3)


def cosine_eager(qkv: Tensor, rel_pos_bias_table: Tensor, logit_scale: Tensor, **prepared: Any) -> Tensor:
    """Do the same with the cosines of Swin V2."""
    return eager(_unit(qkv, logit_scale, prepared["num_heads"]), rel_pos_bias_table, **prepared)


def cosine_sdpa(qkv: Tensor, rel_pos_bias_table: Tensor, logit_scale: Tensor, **prepared: Any) -> Tensor:
    """Do the same with the cosines of Swin V2."""
    return sdpa(_unit(qkv, logit_scale, prepared["num_heads"]), rel_pos_bias_table, **prepared)


def gathered_bias(table: Tensor, index: Tensor, cut: Cut) -> Tensor:
    """Read the bias (h, N, N) of all pairs out of the table."""
    return table.index_select(0, index).view(cut.num_tokens, cut.num_tokens, -1).permute(2, 0, 1)


def rival(function: Function) -> Callable[[Inputs], Function]:
    """Return ``build(inputs)`` for a function that takes what ``setup`` prepared."""
    return lambda inputs: functools.partial(function, **inputs.prepared)


def case(name: str, shape: Shape) -> Case:
    """Name a shape."""
    return Case(name, functools.partial(setup, shape))


SUBJECT = Subject(
    op="window_attention",
    checked=(
        case("7x7 shifted", Shape(batch=2, height=28, width=28, heads=3)),
        case("7x7 ragged", Shape(batch=2, height=25, width=30, heads=2)),
        case("12x12 shifted", Shape(batch=1, height=24, width=24, heads=2, window=12, shift=6)),
    ),
    timed={
        "cpu": case("Swin-T stage 1, 8 images", Shape(batch=8, height=56, width=56, heads=3)),
        "cuda": case("Swin-T stage 1, 128 images", Shape(batch=128, height=56, width=56, heads=3)),
    },
    rivals={"eager": rival(eager), "sdpa": rival(sdpa)},
    small=(
        case("ragged and shifted", Shape(2, 9, 11, 2, window=4, shift=2, head_dim=16)),
        Case("cosines, bias, pads", setup_every_option),
        Case("3-D", functools.partial(setup, Shape3d(1, 3, 5, 6, 2, window=(2, 4, 4), shift=(1, 2, 2), head_dim=16))),
    ),
    empty=case("no maps", Shape(0, 9, 11, 2, window=4, shift=2, head_dim=16)),
    autocast=("qkv",),
)
SUBJECTS = {"window_attention": SUBJECT}
