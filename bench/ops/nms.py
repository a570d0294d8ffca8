"""Non-maximum suppression of the boxes of one image, beside a loop over them and torchvision's.

It has no gradient and one mode. Boxes are float32, as heads give them; overlaps in fewer bits would be others.

Letters: N boxes.
"""

import functools
from dataclasses import dataclass

import torch

from bench.competitors import Build, Rival, found, library, ours
from bench.session import Built, Plan
from florence_fast.ops.cases import Inputs
from florence_fast.ops.nms import cases

OP = "nms"
PLACE = 15
WHAT = "boxes of one class, beside torchvision"
TUNED = False
MODES = ("forward",)


@dataclass(frozen=True)
class Shape:
    """The boxes of one image, of one class or of several."""

    boxes: int
    classes: int | None = None


SHAPES = {"boxes_1000": Shape(1000), "boxes_8192": Shape(8192)}
REHEARSAL = {"tiny": Shape(70)}


def takes(shape: Shape, dtype: str) -> bool:
    """Say whether a size is measured in a dtype."""
    return dtype == "fp32"


def setup(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw boxes and scores."""
    return cases.setup(shape.boxes, shape.classes, dtype, device, seed)


# Four coordinates and a score are read; how many indices are written is a matter of the boxes, and they are few.
def bytes_moved(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes that the op cannot but move."""
    return 5 * shape.boxes * dtype.itemsize


def flops(shape: Shape, mode: str) -> int:
    """Return 0: there is no product."""
    return 0


def units(shape: Shape) -> int:
    """Return the words of a box against 32 that come later: what the static budget counts its clocks for."""
    return 32 * -(-((-(-shape.boxes // 32)) ** 2) // 2)


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return nothing: what the op waits for is one program's latency, of which the static budget knows nothing."""
    return []


def eager(inputs: Inputs) -> functools.partial:
    """Take the loop over boxes."""
    return functools.partial(cases.eager, **inputs.options)


def torchvision(inputs: Inputs, plan: Plan) -> Built:
    """Call torchvision's, which moves classes apart instead of comparing them."""
    if "idxs" in inputs.options:
        return Built(functools.partial(found("torchvision", "ops.batched_nms"), **inputs.options))
    return Built(functools.partial(found("torchvision", "ops.nms"), **inputs.options))


def box_field(op: str, rival: Rival) -> dict[str, Build]:
    """Return the competitors: nothing is compiled, for the number of boxes that are kept is no constant."""
    return {
        "ours (triton)": ours(op, "triton"),
        "eager": library(rival),
        "torchvision": torchvision,
        "ours (torch)": ours(op, "torch"),
    }


COMPETITORS = box_field(OP, eager)
SLOW_TO_BUILD = ()
