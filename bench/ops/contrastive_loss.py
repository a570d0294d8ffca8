"""The contrastive loss at the batches of contrastive pretraining, beside those that write all logits or do not.

Float64 decides about every row, and has no time for 10^12 logits. A batch of more than 16,384 pairs therefore holds
16,384 drawn ones several times over: its loss and gradients follow exactly from those of the draw (see
``repeated_setup``), and what is compared is still every number of the whole batch, as the kernels gave it.

Letters: B pairs · D embedding dim.
"""

from dataclasses import dataclass

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors_losses import cut_cross_entropy, inf_cl, loss_field, open_clip
from florence_fast.ops.cases import Inputs
from florence_fast.ops.contrastive_loss import cases
from florence_fast.ops.contrastive_loss.cases import SUBJECT

__all__ = [
    "COMPETITORS",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "takes",
    "units",
]

OP = "contrastive_loss"
PLACE = 3
WHAT = "up to 65,536 pairs beside the losses that write all logits, up to a million alone"


@dataclass(frozen=True)
class Shape:
    """One batch: CLIP's diagonal, or UniCL with this many names."""

    batch: int
    dim: int
    names: int | None = None
    repeats: int = 1
    """How often the batch holds each drawn pair."""


# The most valuable first: a run may be cut short, and the last takes minutes.
SHAPES = {
    "clip_16k_d512": Shape(16384, 512),
    "clip_16k_d1024": Shape(16384, 1024),
    "clip_64k_d512": Shape(65536, 512, repeats=4),
    "unicl_16k_d512": Shape(16384, 512, 8192),
    "clip_4k_d768": Shape(4096, 768),
    "ragged_5000_d512": Shape(5000, 512),
    "clip_64k_d768": Shape(65536, 768, repeats=4),
    "clip_64k_d1024": Shape(65536, 1024, repeats=4),
    "unicl_64k_d512": Shape(65536, 512, 8192, repeats=4),
    "clip_256k_d512": Shape(262_144, 512, repeats=16),
    "clip_1m_d512": Shape(1_048_576, 512, repeats=64),
}
REHEARSAL = {"tiny": Shape(70, 32), "tiny_unicl": Shape(90, 24, 20), "tiny_repeated": Shape(66, 32, repeats=3)}


def takes(shape: Shape, dtype: str) -> bool:
    """Say whether a size is measured in a dtype: a million pairs in bfloat16, as one trains on them."""
    return dtype == "bf16" or shape.batch <= 65536


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the features of a batch."""
    return cases.repeated_setup(*(shape.batch, shape.dim, shape.names, shape.repeats), dtype, device, seed)


# Both features are read, and in the backward their gradients written; B x B logits are not.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 2, "backward": 4, "both": 6}[mode]
    return streams * shape.batch * shape.dim * dtype.itemsize


# One product gives both directions; the backward has one a side. Recomputing the logits counts for nothing.
def flops(shape: Shape, mode: str) -> int:
    """Return the FLOPs of the products."""
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    return products * 2 * shape.batch**2 * shape.dim


def units(shape: Shape) -> int:
    """Return the number of tiles of 128 x 128 logits: what the static budget counts its clocks for."""
    return (-(-shape.batch // 128)) ** 2


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``: the products of the backward are not."""
    return [f"contrastive_loss D{shape.dim} {dtype} forward"] if mode == "forward" else []


COMPETITORS = loss_field(
    OP,
    SUBJECT.rivals["eager"],
    {"open_clip": open_clip, "Inf-CL": inf_cl, "cut-cross-entropy": cut_cross_entropy},
)
