"""Shifted-window attention at the stages of Swin-T and Swin-B, and in windows of 12x12.

Letters: H W map height and width · C channels · M windows of one map · N tokens in one window · h heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.cpu.native_rows.base import DTYPES, OURS, Call, Run, Subject
from florence_fast import ops
from florence_fast.ops.cases import Inputs
from florence_fast.ops.window_attention.cases import Shape, eager, sdpa, setup

OPS = ("window_attention",)
STAGES = ((56, 1), (28, 2), (14, 4), (7, 8))
"""The side of the map, and how many times the heads of stage 1 there are."""
SHAPES = {
    **{f"Swin-T 224 stage {i}, 7x7": Shape(8, side, side, 3 * n) for i, (side, n) in enumerate(STAGES, 1)},
    **{f"Swin-B 224 stage {i}, 7x7": Shape(8, side, side, 4 * n) for i, (side, n) in enumerate(STAGES, 1)},
    **{
        f"Swin-B 384 stage {i}, 12x12": Shape(2, side, side, heads, window=12, shift=6)
        for i, (side, heads) in enumerate(((96, 4), (48, 8), (24, 16), (12, 32)), 1)
    },
}
TINY = {"tiny, 7x7": Shape(1, 14, 14, 1)}
OUR_TORCH = "our torch backend"


def measure(run: Run) -> None:
    """Make the rows."""
    for mode in ("forward", "both"):
        for dtype in DTYPES:
            for name, shape in (TINY if run.tiny else SHAPES).items():
                sizes = {"batch": shape.batch, "size": list(shape.size), "heads": shape.heads, "window": shape.window}
                subject = Subject("window_attention", name, sizes, dtype, mode)
                if run.wanted(subject, COMPETITORS):
                    inputs = setup(shape, DTYPES[dtype], "cpu")
                    run.compare(subject, {who: functools.partial(_build, who, inputs, mode) for who in COMPETITORS})


def _build(name: str, inputs: Inputs, mode: str) -> Call:
    return in_mode(COMPETITORS[name](inputs), inputs.tensors, inputs.grad_out, mode)


def in_mode(function: Callable[..., Any], tensors: dict[str, torch.Tensor], grad_out: torch.Tensor, mode: str) -> Call:
    """Return a call of ``function`` alone, or with its backward to every tensor."""

    def forward() -> Any:
        with torch.inference_mode():
            return function(**tensors)

    def both() -> Any:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        return torch.autograd.grad(function(**leaves), tuple(leaves.values()), grad_out)

    return forward if mode == "forward" else both


def _ours(inputs: Inputs) -> Callable[..., Any]:
    return functools.partial(ops.window_attention, **inputs.options)


def _our_torch(inputs: Inputs) -> Callable[..., Any]:
    def run(**tensors: torch.Tensor) -> torch.Tensor:
        with ops.backend("torch"):
            return ops.window_attention(**tensors, **inputs.options)

    return run


# Roll, partition, attention and reverse, the mask kept as a model keeps it, the bias read out of its table each time.
COMPETITORS: dict[str, Callable[[Inputs], Callable[..., Any]]] = {
    OURS: _ours,
    OUR_TORCH: _our_torch,
    "SDPA": lambda inputs: functools.partial(sdpa, **inputs.prepared),
    "matmul and softmax": lambda inputs: functools.partial(eager, **inputs.prepared),
}
