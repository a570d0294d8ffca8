"""Non-maximum suppression: of boxes that overlap, the best one stays. The last step of detection.

Dynamic Head's ATSS (Florence, arXiv 2111.11432, section 2.4) ends with it, class by class. Arguments and results are
torchvision's; classes are told apart by comparing them, not by moving their boxes apart, which costs half precision
its last digits.

Letters: N boxes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch
from florence_fast.ops.boxes import box_iou, check_boxes
from florence_fast.ops.checks import check_tensor
from florence_fast.ops.registration import RegisteredOp
from florence_fast.ops.spec import Op


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the best box, drop those that overlap it by more than ``iou_threshold``, and go on with what is left.

    Args:
        boxes: (N, 4), (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, floating.
        scores: (N,), floating; of equal ones the first counts as the better.
        iou_threshold: of the intersection over union.

    Returns:
        (K,) int64, the indices of the kept boxes, best first; no gradient flows through them.

    Raises:
        TypeError: an argument is no tensor or not floating, or the threshold is no number.
        ValueError: a shape or a device is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    Overlaps are computed in float32, or float64 for float64 boxes. A pair without area does not overlap. torch.compile
    with fullgraph=True needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``, as for torch.nonzero.

    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [9.0, 9.0, 10.0, 10.0]])
    >>> nms(boxes, torch.tensor([0.1, 0.8, 0.3]), iou_threshold=0.5)
    tensor([1, 2])
    """
    threshold = _check_nms(boxes, scores, None, iou_threshold)
    backend = dispatch.choose("nms", boxes, scores, iou_threshold)
    return _nms(boxes.detach(), scores.detach(), None, threshold, backend)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress as ``nms`` does, but boxes of equal ``idxs`` alone: those of one class, or of one image.

    Args:
        boxes: (N, 4), (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, floating.
        scores: (N,), floating; of equal ones the first counts as the better.
        idxs: (N,), integers, to which class or image each box belongs.
        iou_threshold: of the intersection over union.

    Returns:
        (K,) int64, the indices of the kept boxes, best first over all classes.

    Raises:
        TypeError: an argument is no tensor or of a wrong kind, or the threshold is no number.
        ValueError: a shape or a device is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0]])
    >>> batched_nms(boxes, torch.tensor([0.1, 0.8]), torch.tensor([5, 7]), iou_threshold=0.5)
    tensor([1, 0])
    """
    if idxs is None:
        raise TypeError("idxs must be a tensor of integers, got NoneType")
    threshold = _check_nms(boxes, scores, idxs, iou_threshold)
    backend = dispatch.choose("batched_nms", boxes, scores, idxs, iou_threshold)
    return _nms(boxes.detach(), scores.detach(), idxs, threshold, backend)


def _check_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> float:
    """Raise what is wrong with the arguments; return the threshold as a number."""
    check_tensor("boxes", boxes)
    check_tensor("scores", scores)
    if idxs is not None and (not isinstance(idxs, Tensor) or idxs.is_floating_point() or idxs.is_complex()):
        got = idxs.dtype if isinstance(idxs, Tensor) else type(idxs).__name__
        raise TypeError(f"idxs must be a tensor of integers, got {got}")
    if not isinstance(iou_threshold, int | float | torch.SymFloat):
        raise TypeError(f"iou_threshold must be a number, got {type(iou_threshold).__name__}")
    check_boxes("boxes", boxes)
    for name, x in (("scores", scores), ("idxs", idxs)):
        if x is not None and (x.ndim != 1 or x.shape[0] != boxes.shape[0]):
            raise ValueError(f"{name} must have shape ({boxes.shape[0]},), got {tuple(x.shape)}")
        if x is not None and x.device != boxes.device:
            raise ValueError(f"{name} must be on the device of boxes, {boxes.device}, got {x.device}")
    return float(iou_threshold)


def nms_reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Define ``nms`` in plain PyTorch: the same arguments and result."""
    return batched_nms_reference(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms_reference(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Define ``batched_nms`` in plain PyTorch: the same arguments and result."""
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left):
        best, left = left[:1], left[1:]
        kept.append(best)
        # Compared in float64, which holds the threshold as it was given.
        overlaps = box_iou(boxes[best], boxes[left])[0].double() > iou_threshold
        left = left[~(overlaps & (idxs[left] == idxs[best]))]
    return torch.cat(kept) if kept else left


def _triton_reasons(boxes: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = dispatch.triton_reasons(boxes)
    if boxes.dtype == torch.float64:
        reasons.append("the kernels compute in float32, got boxes of torch.float64")
    return reasons


_REASONS = {"triton": _triton_reasons, "cpp": lambda boxes, *_, **__: native.reasons(boxes)}


# One op for both functions. It has no backward, and how many boxes it keeps is known only when it has run.
def _kept_indices(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, backend: str) -> Tensor:
    if backend == "reference" or len(boxes) == 0:
        if idxs is None:
            return nms_reference(boxes, scores, iou_threshold)
        return batched_nms_reference(boxes, scores, idxs, iou_threshold)
    best_first = scores.argsort(descending=True, stable=True)
    if idxs is None:
        by_class = torch.arange(len(boxes), device=boxes.device)
        end = torch.full_like(by_class, len(boxes))
    else:
        classes, by_class = idxs.index_select(0, best_first).sort(stable=True)
        end = torch.searchsorted(classes, classes, right=True)
    ordered = check_boxes("boxes", boxes.index_select(0, best_first.index_select(0, by_class)))
    threshold = _rounded_down(iou_threshold, ordered.dtype)
    kept = _suppress.backend(backend).nms_kept(ordered, end, threshold)
    return best_first[torch.empty_like(kept).index_copy_(0, by_class, kept)]


def _fake(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, backend: str) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _arguments(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (boxes, scores, *(() if idxs is None else (idxs,)), iou_threshold), {}


def _entry_of(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> str:
    return "nms" if idxs is None else "batched_nms"


def _rounded_down(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of ``dtype`` up to ``threshold``: what is above one is above the other."""
    rounded = torch.tensor(threshold, dtype=dtype, device="cpu")
    if rounded.item() > threshold:
        rounded = rounded.nextafter(torch.full_like(rounded, -math.inf))
    return rounded.item()


def _example_boxes(device: str) -> tuple[Tensor, Tensor]:
    corner, size = torch.rand(2, 40, 2, device=device)
    return torch.cat((corner, corner + size), 1), torch.rand(40, device=device)


def _nms_example(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*_example_boxes(device), 0.3), {}


def _batched_nms_example(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    boxes, scores = _example_boxes(device)
    return (boxes, scores, torch.arange(len(boxes), device=device) % 3, 0.3), {}


_suppress = Op(nms, nms_reference, example=_nms_example, reasons=_REASONS)
Op(batched_nms, batched_nms_reference, example=_batched_nms_example, reasons=_REASONS)
_nms = RegisteredOp("nms", _kept_indices, _fake, _arguments, _entry_of)
