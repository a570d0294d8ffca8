"""The sigmoid loss at the batches of SigLIP, beside the plain one that writes all logits and the public kernel.

Sizes and formulas are those of ``contrastive_loss``: the same products. Copies of a pair would be negatives of each
other here, so that no larger batch can be judged by a smaller one, and sizes end where float64 has room.
"""

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors_losses import loss_field, siglip_kernel
from bench.ops.contrastive_loss import Shape, bytes_moved, flops, units
from florence_fast.ops.cases import Inputs
from florence_fast.ops.sigmoid_loss import cases

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
    "units",
]

OP = "sigmoid_loss"
PLACE = 11
WHAT = "SigLIP's loss beside the plain one and siglip-kernel"
SHAPES = {
    "siglip_16k_d512": Shape(16384, 512),
    "siglip_16k_d768": Shape(16384, 768),
    "labels_16k_d512": Shape(16384, 512, 8192),
}
REHEARSAL = {"tiny": Shape(70, 32)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the features of a batch."""
    return cases.setup(shape.batch, shape.dim, shape.names, dtype, device, seed)


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``: the products of the backward are not."""
    return [f"sigmoid_loss D{shape.dim} {dtype} forward"] if mode == "forward" else []


COMPETITORS = loss_field(OP, cases.SUBJECT.rivals["eager"], {"siglip-kernel": siglip_kernel})
