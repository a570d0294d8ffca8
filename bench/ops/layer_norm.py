"""Layer norm on the maps of the paper's models, beside PyTorch's own and torch.compile.

Letters: R rows · C channels.
"""

from dataclasses import dataclass

import torch

from bench.competitors import compiled, library, ours
from florence_fast.verify.cases import Inputs
from florence_fast.verify.rows import draw_layer_norm, plain_layer_norm

OP = "layer_norm"


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


COMPETITORS = {
    "ours (triton)": ours(OP, "triton"),
    "eager": library(lambda inputs: plain_layer_norm),
    "ours (torch)": ours(OP, "torch"),
    "torch.compile": compiled(lambda inputs: plain_layer_norm),
}
SLOW_TO_BUILD = ("torch.compile",)
