"""The ``cpp`` backend of suppression: which of the sorted boxes stay, by a native kernel.

Letters: N boxes
"""

import torch
from torch import Tensor

from florence_fast import native


def nms_kept(boxes: Tensor, end: Tensor, threshold: float) -> Tensor:
    """Say which of the sorted boxes (N, 4) are kept, (N,) bool; ``end`` (N,) says where the class of each ends."""
    kept = boxes.new_empty(len(boxes), dtype=torch.bool)
    native.call("nms", len(boxes), boxes.contiguous(), end.contiguous(), threshold, kept)
    return kept
