"""Layer norm on the maps of the paper's models, beside PyTorch's own and torch.compile.

Letters: R rows · C channels.
"""

from dataclasses import dataclass

import torch

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import field, found, needs_gpu
from bench.session import Built, Plan
from florence_fast.ops.cases import Inputs
from florence_fast.ops.layer_norm.cases import draw_layer_norm, plain_layer_norm

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

OP = "layer_norm"
PLACE = 5
WHAT = "layer norm on the maps of the models, beside apex and Liger"


@dataclass(frozen=True)
class Shape:
    """Rows of channels: the tokens of a batch of maps."""

    rows: int
    channels: int


SHAPES = {
    "swin_t_stage1_224": Shape(128 * 56 * 56, 96),
    "swin_t_stage3_224": Shape(128 * 14 * 14, 384),
    "coswin_h_stage3_224": Shape(64 * 14 * 14, 1024),
    "coswin_h_stage1_224": Shape(64 * 56 * 56, 256),
    "ragged": Shape(100_003, 200),
}
REHEARSAL = {"tiny": Shape(70, 96), "tiny_ragged": Shape(33, 40)}


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw rows, weight and bias."""
    return draw_layer_norm(shape.rows, shape.channels)(dtype, device, seed)


# x is read and the result written; the backward reads x and the gradient and writes that of x.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    streams = {"forward": 2, "backward": 3, "both": 5}[mode]
    return streams * shape.rows * shape.channels * dtype.itemsize


def flops(shape: Shape, mode: str) -> int:
    """Return 0: there is no product."""
    return 0


def units(shape: Shape) -> int:
    """Return the number of rows: what the static budget counts its clocks for."""
    return shape.rows


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``."""
    directions = ["forward", "backward"] if mode == "both" else [mode]
    return [f"layer_norm C{shape.channels} {dtype} {direction}" for direction in directions]


def apex(inputs: Inputs, plan: Plan) -> Built:
    """Call NVIDIA's fused norm; the apex on PyPI is another package and has none."""
    norm = found("apex", "normalization.fused_layer_norm.mixed_dtype_fused_layer_norm_affine")
    needs_gpu(inputs)
    return Built(lambda x, weight, bias: norm(x, weight, bias, x.shape[-1:], 1e-5))


def liger(inputs: Inputs, plan: Plan) -> Built:
    """Call Liger's kernel."""
    norm = found("liger_kernel", "transformers.functional.liger_layer_norm")
    needs_gpu(inputs)
    return Built(lambda x, weight, bias: norm(x, weight, bias, 1e-5))


COMPETITORS = field(OP, lambda inputs: plain_layer_norm, {"apex": apex, "liger": liger})
