"""The contrastive loss at the batches of contrastive pretraining, beside the plain one that writes all logits.

Letters: B pairs · D embedding dim.
"""

from dataclasses import dataclass

import torch

from bench.competitors import compiled, library, ours
from florence_fast.verify import contrastive_loss
from florence_fast.verify.cases import Inputs
from florence_fast.verify.contrastive_loss import SUBJECT

OP = "contrastive_loss"


@dataclass(frozen=True)
class Shape:
    """One batch: CLIP's diagonal, or UniCL with this many names."""

    batch: int
    dim: int
    names: int | None = None


# The gate compares with float64, which needs all B^2 logits several times over: larger batches wait for the suite.
SHAPES = {
    "clip_16k_d512": Shape(16384, 512),
    "clip_16k_d1024": Shape(16384, 1024),
    "unicl_16k_d512": Shape(16384, 512, 8192),
    "clip_4k_d768": Shape(4096, 768),
    "ragged_5000_d512": Shape(5000, 512),
}
REHEARSAL = {"tiny": Shape(70, 32), "tiny_unicl": Shape(90, 24, 20)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the features of a batch."""
    return contrastive_loss.setup(shape.batch, shape.dim, shape.names, dtype, device, seed)


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


COMPETITORS = {
    "ours (triton)": ours(OP, "triton"),
    "eager": library(SUBJECT.rivals["eager"]),
    "ours (torch)": ours(OP, "torch"),
    "torch.compile": compiled(SUBJECT.rivals["eager"]),
}
SLOW_TO_BUILD = ("torch.compile",)
