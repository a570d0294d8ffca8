"""How much boxes overlap: against numbers worked out by hand, plain loops, and their own gradients.

Letters: N boxes on one side · M on the other.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from florence_fast.ops.boxes import box_iou, generalized_box_iou


def draw(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    corner, size = torch.rand(2, count, 2, dtype=torch.float64)
    return torch.cat((corner, corner + size), 1).to(dtype)


def in_loops(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    iou, giou = torch.zeros(2, len(boxes1), len(boxes2), dtype=torch.float64)
    for i, (ax1, ay1, ax2, ay2) in enumerate(boxes1.tolist()):
        for j, (bx1, by1, bx2, by2) in enumerate(boxes2.tolist()):
            both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
            union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
            around = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
            iou[i, j], giou[i, j] = both / union, both / union - (around - union) / around
    return iou, giou


def test_known_numbers() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [1, 1, 2, 2], [4, 0, 6, 2]])
    assert torch.equal(box_iou(boxes[:1], boxes), torch.tensor([[1, 1 / 3, 1 / 4, 0]]))
    torch.testing.assert_close(generalized_box_iou(boxes[:1], boxes), torch.tensor([[1, 1 / 3, 1 / 4, -1 / 3]]))


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou])
def test_equals_loops(function: Any) -> None:
    boxes1, boxes2 = draw(7, torch.float64), draw(5, torch.float64)
    torch.testing.assert_close(function(boxes1, boxes2), in_loops(boxes1, boxes2)[function is generalized_box_iou])


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.uint8], ids=str)
def test_areas_of_half_precision_and_integers_do_not_overflow(function: Any, dtype: torch.dtype) -> None:
    boxes = (draw(6) * 120).round().to(dtype)
    boxes[:, 2:] = boxes[:, 2:] + 1
    if dtype == torch.float16:
        boxes *= 8
    found = function(boxes, boxes)
    assert found.dtype == torch.float32 and torch.equal(found, function(boxes.float(), boxes.float()))
    assert found.isfinite().all() and torch.equal(found.diagonal(), torch.ones(6))


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou])
def test_gradcheck(function: Any) -> None:
    boxes = [draw(n, torch.float64).requires_grad_() for n in (3, 4)]
    assert torch.autograd.gradcheck(function, boxes)


def test_apart_boxes_are_drawn_together_by_giou_alone() -> None:
    box = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    other = torch.tensor([[3.0, 0, 4, 1]])
    assert not torch.autograd.grad(box_iou(box, other).sum(), box)[0].any()
    assert torch.autograd.grad(generalized_box_iou(box, other).sum(), box)[0][0, 2] > 0


def test_no_area_no_boxes_and_nan() -> None:
    point = torch.tensor([[1.0, 1, 1, 1]])
    assert box_iou(point, point).isnan().all() and generalized_box_iou(point, point).isnan().all()
    assert box_iou(draw(0), draw(3)).shape == (0, 3) and generalized_box_iou(draw(3), draw(0)).shape == (3, 0)
    assert box_iou(torch.full((1, 4), torch.nan), draw(2)).isnan().all()


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou])
def test_compiles_in_full(function: Any) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((3, 4), (5, 2)):
        boxes1, boxes2 = draw(n), draw(m)
        assert torch.equal(compiled(boxes1, boxes2), function(boxes1, boxes2))


BAD = [
    ({"boxes1": [1.0]}, TypeError, "boxes1 must be a tensor of real numbers, got list"),
    ({"boxes2": torch.zeros(1, 4, dtype=torch.complex64)}, TypeError, "boxes2 must be a tensor of real numbers, got"),
    ({"boxes1": torch.zeros(4)}, ValueError, "boxes1 must have shape (N, 4), got (4,)"),
    ({"boxes2": torch.zeros(2, 5)}, ValueError, "boxes2 must have shape (N, 4), got (2, 5)"),
    ({"boxes2": torch.zeros(2, 4, device="meta")}, ValueError, "boxes2 must be on the device of boxes1, cpu, got meta"),
]


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments_are_named(function: Any, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**{"boxes1": draw(2), "boxes2": draw(2), **change})
