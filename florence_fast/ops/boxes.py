"""How much boxes overlap: what detection matches boxes by, and what it is trained with.

Dynamic Head's ATSS (Florence, arXiv 2111.11432, section 2.4) assigns anchors by IoU and is trained with GIoU
(1902.09630, algorithm 1). Plain PyTorch that autograd differentiates and torch.compile fuses: there is nothing that a
kernel would spare. Arguments and results are torchvision's.

Letters: N boxes on one side · M on the other.
"""

import torch
from torch import Tensor


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return intersection over union of each pair of boxes.

    Args:
        boxes1: (N, 4), (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2.
        boxes2: (M, 4), on the device of ``boxes1``.

    Returns:
        (N, M): float64 if either side is, else float32, in which half precision and integers are computed.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape or a device is wrong.

    NaN for two boxes without area.

    >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
    tensor([[0.3333]])
    """
    boxes1, boxes2 = check_boxes("boxes1", boxes1), check_boxes("boxes2", boxes2, boxes1.device)
    intersection, union = _intersection_and_union(boxes1, boxes2)
    return intersection / union


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalised intersection over union of each pair of boxes.

    ``IoU - (A - union) / A``, A being the area of the smallest box around both (1902.09630, algorithm 1): it tells how
    far apart boxes are that do not meet.

    Args:
        boxes1: (N, 4), (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2.
        boxes2: (M, 4), on the device of ``boxes1``.

    Returns:
        (N, M), between -1 and 1: float64 if either side is, else float32.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape or a device is wrong.

    NaN for two boxes without area.

    >>> generalized_box_iou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
    tensor([[-0.3333]])
    """
    boxes1, boxes2 = check_boxes("boxes1", boxes1), check_boxes("boxes2", boxes2, boxes1.device)
    intersection, union = _intersection_and_union(boxes1, boxes2)
    low = torch.minimum(boxes1[:, None, :2], boxes2[:, :2])
    high = torch.maximum(boxes1[:, None, 2:], boxes2[:, 2:])
    around = (high - low).clamp(min=0).prod(2)
    return intersection / union - (around - union) / around


def check_boxes(name: str, boxes: Tensor, device: torch.device | None = None) -> Tensor:
    """Raise what is wrong with boxes; return them in the dtype in which they are computed."""
    if not isinstance(boxes, Tensor) or boxes.is_complex():
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {got}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must have shape (N, 4), got {tuple(boxes.shape)}")
    if device is not None and boxes.device != device:
        raise ValueError(f"{name} must be on the device of boxes1, {device}, got {boxes.device}")
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    area1, area2 = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes1, boxes2))
    low = torch.maximum(boxes1[:, None, :2], boxes2[:, :2])
    high = torch.minimum(boxes1[:, None, 2:], boxes2[:, 2:])
    width, height = (high - low).clamp(min=0).unbind(2)
    intersection = width * height
    return intersection, area1[:, None] + area2 - intersection
