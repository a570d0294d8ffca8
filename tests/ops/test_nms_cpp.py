"""Native suppression against the definition, box by box, at every level that runs here.

Letters: N boxes
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from florence_fast.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from tests.ops.test_nms import FIXTURE, OP, best, draw

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]


@pytest.mark.parametrize("number", range(len(FIXTURE)))
def test_equals_torchvision(number: int, level: str) -> None:
    case = FIXTURE[number]
    assert (
        nms(torch.tensor(case["boxes"]), torch.tensor(case["scores"]), case["iou_threshold"]).tolist() == case["kept"]
    )


@pytest.mark.parametrize("count", [1, 17, 128, 129, 1500])
@pytest.mark.parametrize("coarse", [True, False])
def test_keeps_what_the_definition_keeps_at_every_level(count: int, coarse: bool, level: str) -> None:
    boxes, scores, idxs = draw(count, coarse)
    for threshold in (0.0, 1 / 3, 0.5, 0.9):
        assert torch.equal(nms(boxes, scores, threshold), nms_reference(boxes, scores, threshold))
        kept = batched_nms(boxes, scores, idxs, threshold)
        assert torch.equal(kept, batched_nms_reference(boxes, scores, idxs, threshold))


@given(
    count=st.integers(0, 700),
    coarse=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.0, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0, math.nan]),
    classes=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
def test_any_size(count: int, coarse: bool, threshold: float, classes: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    boxes, scores, _ = draw(count, coarse, dtype)
    idxs = torch.randint(classes, (count,))
    assert torch.equal(nms(boxes, scores, threshold), nms_reference(boxes, scores, threshold))
    kept = batched_nms(boxes, scores, idxs, threshold)
    assert torch.equal(kept, batched_nms_reference(boxes, scores, idxs, threshold))


def test_overlaps_have_the_bits_of_the_definition(level: str) -> None:
    """Thresholds are overlaps that occur: a product that melts into a sum would move some of them to the other side."""
    corner, size = torch.rand(2, 200, 2)
    boxes, scores = torch.cat((corner, corner + size), 1), torch.rand(200)
    overlaps = ops.boxes.box_iou(boxes, boxes).flatten()
    for threshold in overlaps[overlaps > 0.2][:60].tolist():
        assert torch.equal(nms(boxes, scores, threshold), nms_reference(boxes, scores, threshold)), threshold


def test_nan_infinity_and_no_area(level: str) -> None:
    odd = torch.tensor([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])
    boxes, scores = odd[torch.randint(len(odd), (400, 4))], torch.rand(400)
    for threshold in (0.0, 0.1, 0.5):
        assert torch.equal(nms(boxes, scores, threshold), nms_reference(boxes, scores, threshold))


def test_a_long_chain_in_which_every_box_depends_on_the_one_before(level: str) -> None:
    first = torch.arange(1000.0)
    boxes = torch.stack((first, first * 0, first + 2, first * 0 + 1), 1)
    assert nms(boxes, -first, 0.3).tolist() == list(range(0, 1000, 2))


def test_equal_for_any_number_of_threads_and_any_strides(level: str) -> None:
    boxes, scores, idxs = draw(3000)
    expected = batched_nms(boxes, scores, idxs, 0.4)
    turned = boxes.T.contiguous().T, scores.repeat_interleave(2)[::2], idxs.int().repeat_interleave(3)[::3]
    moved = torch.cat([torch.zeros(1), boxes.flatten()])[1:].view_as(boxes), scores, idxs
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for inputs in (turned, moved):
            assert torch.equal(batched_nms(*inputs, 0.4), expected)


@pytest.mark.parametrize("classes", [True, False])
def test_opcheck(classes: bool) -> None:
    boxes, scores, idxs = draw(40)
    torch.library.opcheck(OP, (boxes, scores, idxs if classes else None, 0.5, "cpp"))


def test_compiles_in_full() -> None:
    inputs: tuple[Tensor, ...] = draw(60)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), best(*inputs))


def test_float64_is_refused_with_the_reason() -> None:
    boxes, scores, _ = draw(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        nms(boxes, scores, 0.5)
