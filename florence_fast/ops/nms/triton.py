"""The ``triton`` backend of suppression: which of the sorted boxes stay, by two kernels."""

from torch import Tensor

from florence_fast.kernels import nms as kernels


def nms_kept(boxes: Tensor, end: Tensor, threshold: float) -> Tensor:
    """Say which of the sorted boxes (N, 4) are kept, (N,) bool; ``end`` (N,) says where the class of each ends."""
    return kernels.nms_kept(boxes, end.int(), threshold)
