"""Non-maximum suppression class by class, as a detector ends: ``nms`` with a class for each box."""

from bench.ops.nms import (
    MODES,
    SLOW_TO_BUILD,
    Shape,
    box_field,
    budget_cases,
    bytes_moved,
    eager,
    flops,
    setup,
    takes,
    units,
)

__all__ = [
    "COMPETITORS",
    "MODES",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "TUNED",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "takes",
    "units",
]

OP = "batched_nms"
PLACE = 14
WHAT = "boxes of many classes, beside torchvision"
TUNED = False
SHAPES = {"coco_5000": Shape(5000, 80), "coco_10000": Shape(10000, 80)}
REHEARSAL = {"tiny": Shape(70, 3)}

COMPETITORS = box_field(OP, eager)
