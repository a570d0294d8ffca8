"""Non-maximum suppression: the definition against torchvision's results and a plain loop, the ``torch`` backend against
the definition box by box, and what the ops promise beside their values.

Letters: N boxes.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from florence_fast import native, ops
from florence_fast.ops import dispatch
from florence_fast.ops.nms.op import _rounded_down, batched_nms, batched_nms_reference, nms, nms_reference

FIXTURE = json.loads(Path(__file__).with_name("torchvision.json").read_text(encoding="utf-8"))["nms"]
OP = torch.ops.florence_fast.nms.default


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Force the ``torch`` backend where a test names no other: a CPU has native kernels too."""
    with ops.backend("torch"):
        yield


def draw(count: int, coarse: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Draw boxes, scores and classes; coarse ones meet in whole numbers, and many scores are equal."""
    corner, size = torch.rand(2, count, 2)
    boxes, scores = torch.cat((corner, corner + size), 1), torch.rand(count)
    if coarse:
        boxes, scores = (boxes * 4).round(), (scores * 8).round() / 8
    return boxes.to(dtype), scores.to(dtype), torch.randint(0, 4, (count,))


def in_loops(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> list[int]:
    """Look at every pair of boxes, the best first."""
    rows, kept = boxes.float().tolist(), []
    areas = [torch.tensor(x2 - x1).mul(torch.tensor(y2 - y1)).item() for x1, y1, x2, y2 in rows]
    for i in sorted(range(len(rows)), key=lambda i: -scores[i].item()):
        for j in kept:
            width = max(0.0, min(rows[i][2], rows[j][2]) - max(rows[i][0], rows[j][0]))
            both = width * max(0.0, min(rows[i][3], rows[j][3]) - max(rows[i][1], rows[j][1]))
            union = areas[i] + areas[j] - both
            if idxs[i] == idxs[j] and union > 0 and both / union > iou_threshold:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("number", range(len(FIXTURE)))
def test_equals_torchvision(number: int, backend: str) -> None:
    case = FIXTURE[number]
    with ops.backend(backend):
        kept = nms(torch.tensor(case["boxes"]), torch.tensor(case["scores"]), case["iou_threshold"])
    assert kept.dtype == torch.int64 and kept.tolist() == case["kept"]


@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_definition_equals_loops(threshold: float) -> None:
    boxes, scores, idxs = draw(60, coarse=True)
    assert batched_nms_reference(boxes, scores, idxs, threshold).tolist() == in_loops(boxes, scores, idxs, threshold)
    one = torch.zeros_like(idxs)
    assert nms_reference(boxes, scores, threshold).tolist() == in_loops(boxes, scores, one, threshold)


@given(
    count=st.integers(0, 300),
    coarse=st.booleans(),
    threshold=st.sampled_from([0.0, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 100),
)
def test_keeps_what_the_definition_keeps(count: int, coarse: bool, threshold: float, seed: int) -> None:
    torch.manual_seed(seed)
    boxes, scores, idxs = draw(count, coarse)
    assert torch.equal(nms(boxes, scores, threshold), nms_reference(boxes, scores, threshold))
    kept = batched_nms(boxes, scores, idxs, threshold)
    assert torch.equal(kept, batched_nms_reference(boxes, scores, idxs, threshold))


def test_a_long_chain_in_which_every_box_depends_on_the_one_before() -> None:
    first = torch.arange(300.0)
    boxes = torch.stack((first, first * 0, first + 2, first * 0 + 1), 1)
    assert nms(boxes, -first, 0.3).tolist() == list(range(0, 300, 2))


def test_equal_scores_keep_the_first() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(5, 1)
    scores = torch.tensor([0.5, 0.9, 0.9, 0.5, 0.9])
    assert nms(boxes, scores, 0.5).tolist() == [1]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 2, 0, 1]), 0.5).tolist() == [1, 2, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("iou", [0.3, 0.7, 1 / 3, 0.6])
def test_the_threshold_is_not_rounded(iou: float, backend: str) -> None:
    """An overlap that is the threshold rounded to float32 is compared with the threshold itself."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, iou]])
    overlap = boxes[1, 3].item()
    with ops.backend(backend):
        assert len(nms(boxes, torch.tensor([1.0, 0.5]), iou)) == (1 if overlap > iou else 2)
    assert _rounded_down(iou, torch.float32) <= iou < _rounded_down(math.nextafter(iou, 2) + 1e-7, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_precision_keeps_classes_apart_exactly(dtype: torch.dtype) -> None:
    """Moving classes apart by their largest coordinate would leave bfloat16 no digits for the boxes themselves."""
    boxes, scores, idxs = draw(200, dtype=dtype)
    boxes, idxs = boxes * 100, idxs + 1000
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = batched_nms_reference(boxes.to(wide), scores.to(wide), idxs, 0.5)
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nothing_nan_and_no_area(backend: str) -> None:
    with ops.backend(backend):
        assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)
        assert batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5).dtype == torch.int64
        boxes = torch.tensor([[0.0, 0, 1, 1], [math.nan, 0, 1, 1], [2.0, 2, 2, 2], [2.0, 2, 2, 2], [0.0, 0, 1, 1]])
        assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), 0.1).tolist() == [0, 1, 2, 3]
        assert nms(boxes[:2], torch.tensor([0.9, math.nan]), 0.1).tolist() == [1, 0]


def test_any_strides_and_no_gradient() -> None:
    boxes, scores, idxs = draw(80)
    expected = batched_nms(boxes, scores, idxs, 0.4)
    turned = boxes.T.contiguous().T.requires_grad_(), scores.repeat_interleave(2)[::2].requires_grad_()
    kept = batched_nms(*turned, idxs.int().repeat_interleave(3)[::3], 0.4)
    assert torch.equal(kept, expected) and not kept.requires_grad


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_opcheck(backend: str, classes: bool) -> None:
    boxes, scores, idxs = draw(40)
    torch.library.opcheck(OP, (boxes, scores, idxs if classes else None, 0.5, backend))


def best(boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
    return boxes[batched_nms(boxes, scores, idxs, 0.5)] * 2 + nms(boxes, scores, 0.5).shape[0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_once_in_full(backend: str) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), ops.backend(backend):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(best, fullgraph=True, dynamic=True, backend=counter)
        for count in (40, 70, 90):
            inputs = draw(count)
            assert torch.equal(compiled(*inputs), best(*inputs))
        assert counter.frame_count == 1


def test_compiles_without_the_setting_in_two_graphs() -> None:
    inputs = draw(50)
    assert torch.equal(torch.compile(best, backend="aot_eager")(*inputs), best(*inputs))


class Best(torch.nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
        return boxes[batched_nms(boxes, scores, idxs, 0.5)]


def test_export() -> None:
    dims = {0: torch.export.Dim("boxes", min=2)}
    exported = torch.export.export(Best(), draw(40), dynamic_shapes=(dims, dims, dims)).module()
    inputs = draw(60)
    assert torch.equal(exported(*inputs), Best()(*inputs))


@pytest.mark.parametrize("name", ["nms", "batched_nms"])
def test_auto_takes_native_kernels_on_a_cpu_or_library_calls(name: str) -> None:
    args, kwargs = dispatch.OPS[name].example("cpu")
    with ops.backend("auto"):
        assert dispatch.choose(name, *args, **kwargs) == ("cpp" if native.extension() else "torch")


GOOD = dict(zip(("boxes", "scores", "idxs"), draw(6), strict=True)) | {"iou_threshold": 0.5}
BAD = [
    ({"boxes": [1.0]}, TypeError, "boxes must be a floating-point tensor, got list"),
    ({"boxes": torch.zeros(6, 4).long()}, TypeError, "boxes must be a floating-point tensor, got torch.int64"),
    ({"scores": torch.zeros(6).int()}, TypeError, "scores must be a floating-point tensor, got torch.int32"),
    ({"idxs": torch.zeros(6)}, TypeError, "idxs must be a tensor of integers, got torch.float32"),
    ({"idxs": None}, TypeError, "idxs must be a tensor of integers, got NoneType"),
    ({"iou_threshold": "half"}, TypeError, "iou_threshold must be a number, got str"),
    ({"boxes": torch.zeros(6, 5)}, ValueError, "boxes must have shape (N, 4), got (6, 5)"),
    ({"scores": torch.zeros(5)}, ValueError, "scores must have shape (6,), got (5,)"),
    ({"idxs": torch.zeros(6, 1).long()}, ValueError, "idxs must have shape (6,), got (6, 1)"),
    ({"scores": torch.zeros(6, device="meta")}, ValueError, "scores must be on the device of boxes, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        batched_nms(**{**GOOD, **change})
