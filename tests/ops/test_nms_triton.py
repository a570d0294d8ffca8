"""The Triton kernels of non-maximum suppression against the definition, box by box, through the interpreter on a CPU
and on a GPU where there is one.

Letters: N boxes.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from tests.ops.test_nms import draw

FIXTURE = json.loads(Path(__file__).with_name("torchvision.json").read_text(encoding="utf-8"))["nms"]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def check(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> None:
    with ops.backend("triton"):
        alone, by_class = nms(boxes, scores, threshold), batched_nms(boxes, scores, idxs, threshold)
    assert alone.dtype == torch.int64 and alone.device == boxes.device
    assert torch.equal(alone, nms_reference(boxes, scores, threshold))
    assert torch.equal(by_class, batched_nms_reference(boxes, scores, idxs, threshold))


@pytest.mark.parametrize("number", range(len(FIXTURE)))
def test_equals_torchvision(number: int, device: str) -> None:
    case = FIXTURE[number]
    boxes, scores = torch.tensor(case["boxes"], device=device), torch.tensor(case["scores"], device=device)
    with ops.backend("triton"):
        assert nms(boxes, scores, case["iou_threshold"]).tolist() == case["kept"]


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 300])
@pytest.mark.parametrize("coarse", [True, False])
def test_any_number_of_boxes(count: int, coarse: bool, device: str, poisoned_memory: None) -> None:
    check(*(x.to(device) for x in draw(count, coarse)), 0.5)


@settings(max_examples=12)
@given(count=st.integers(0, 80), threshold=st.sampled_from([0.0, 0.3, 1 / 3, 0.7, 1.0]), seed=st.integers(0, 100))
def test_any_threshold(count: int, threshold: float, seed: int) -> None:
    torch.manual_seed(seed)
    check(*draw(count, coarse=seed % 2 == 0), threshold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, device: str) -> None:
    boxes, scores, idxs = (x.to(device) for x in draw(100, dtype=dtype))
    check(boxes * 100, scores, idxs + 1000, 0.5)


def test_a_long_chain_over_many_words(device: str) -> None:
    first = torch.arange(200.0, device=device)
    boxes = torch.stack((first, first * 0, first + 2, first * 0 + 1), 1)
    with ops.backend("triton"):
        assert nms(boxes, -first, 0.3).tolist() == list(range(0, 200, 2))


def test_classes_of_one_box_and_one_class_of_all(device: str) -> None:
    boxes, scores, _ = (x.to(device) for x in draw(70))
    check(boxes, scores, torch.arange(70, device=device).flip(0), 0.1)
    check(boxes, scores, torch.full((70,), -3, device=device), 0.1)


def test_nan_and_no_area(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [math.nan, 0, 1, 1], [2.0, 2, 2, 2], [2.0, 2, 2, 2], [0.0, 0, 1, 1]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    with ops.backend("triton"):
        assert nms(boxes.to(device), scores.to(device), 0.1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("iou", [0.3, 0.7, 0.6])
def test_the_threshold_is_not_rounded(iou: float, device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, iou]])
    with ops.backend("triton"):
        kept = nms(boxes.to(device), torch.tensor([1.0, 0.5], device=device), iou)
    assert len(kept) == (1 if boxes[1, 3].item() > iou else 2)


def test_opcheck(device: str) -> None:
    boxes, scores, idxs = (x.to(device) for x in draw(40))
    torch.library.opcheck(torch.ops.florence_fast.nms.default, (boxes, scores, idxs, 0.5, "triton"))


def test_compiles_in_full(device: str) -> None:
    def best(boxes: Tensor, scores: Tensor) -> Tensor:
        return boxes[nms(boxes, scores, 0.5)]

    boxes, scores, _ = (x.to(device) for x in draw(50))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), ops.backend("triton"):
        compiled = torch.compile(best, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        assert torch.equal(compiled(boxes, scores), best(boxes, scores))


def test_float64_is_refused_with_the_reason(device: str) -> None:
    boxes, scores, _ = (x.to(device) for x in draw(5, dtype=torch.float64))
    with ops.backend("triton"), pytest.raises(RuntimeError, match="compute in float32, got boxes"):
        nms(boxes, scores, 0.5)
