"""Whether native kernels and the library's products get in each other's way: each alone, and the two alternating."""

import functools

import torch

from bench.cpu.native_rows.base import DTYPES, Call, Run, Subject
from florence_fast import ops
from florence_fast.ops.window_attention.cases import Shape, setup

OPS = ("threads",)
NATIVE, PRODUCT, ALTERNATING = "native op alone", "product alone", "the two alternating"
SHAPES = {"Swin-T stage 1": Shape(8, 56, 56, 3), "Swin-T stage 4": Shape(8, 7, 7, 24)}
TINY = {"tiny": Shape(1, 14, 14, 1)}
CALLS = 10
"""In one sample, so that a switch from one to the other is seen many times."""


def measure(run: Run) -> None:
    """Make the rows: window attention, and the product that makes qkv."""
    for name, shape in (TINY if run.tiny else SHAPES).items():
        for dtype in DTYPES:
            subject = Subject("threads", name, {"calls": CALLS}, dtype, "forward")
            if run.wanted(subject, dict.fromkeys((NATIVE, PRODUCT, ALTERNATING))):
                run.compare(subject, _builds(shape, dtype))


def _builds(shape: Shape, dtype: str) -> dict[str, functools.partial[Call]]:
    inputs = setup(shape, DTYPES[dtype], "cpu")
    channels = shape.heads * shape.head_dim
    x = torch.randn(inputs.tensors["qkv"][..., 0].numel(), channels).to(DTYPES[dtype])
    weight = torch.randn(3 * channels, channels).to(DTYPES[dtype])

    def native() -> None:
        ops.window_attention(**inputs.tensors, **inputs.options)

    def product() -> None:
        torch.nn.functional.linear(x, weight)

    def repeated(*works: Call) -> Call:
        def run() -> None:
            with torch.inference_mode():
                for _ in range(CALLS):
                    for work in works:
                        work()

        return run

    return {
        NATIVE: functools.partial(repeated, native),
        PRODUCT: functools.partial(repeated, product),
        ALTERNATING: functools.partial(repeated, native, product),
    }
