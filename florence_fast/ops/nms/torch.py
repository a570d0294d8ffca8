"""The ``torch`` backend of suppression: library calls only, block by block, on any device.

Letters: N boxes · R those of one block.
"""

import torch
from torch import Tensor

BLOCK = 128
"""How many boxes are settled at a time."""


def nms_kept(boxes: Tensor, end: Tensor, threshold: float) -> Tensor:
    """Say which of the sorted boxes (N, 4) are kept, (N,) bool; ``end`` (N,) says where the class of each ends."""
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    coordinates = boxes.T.contiguous()
    for start in range(0, len(boxes), BLOCK):
        stop = min(start + BLOCK, len(boxes))
        rows = start + alive[start:stop].nonzero().flatten()
        columns = start + alive[start : int(end[stop - 1])].nonzero().flatten()
        later = (columns > rows[:, None]) & (columns < end[rows][:, None])
        hits = (_overlaps(coordinates[:, rows, None], coordinates[:, None, columns]) > threshold) & later
        stays = _settle(hits[:, : len(rows)])
        alive[columns[hits[stays].any(0)]] = False
    return alive


def _overlaps(rows: Tensor, columns: Tensor) -> Tensor:
    """Compute ``box_iou`` of coordinates (4, R, 1) and (4, 1, N): the same bits, in contiguous passes over (R, N)."""
    (x1, y1, x2, y2), (cx1, cy1, cx2, cy2) = rows, columns
    width = torch.minimum(x2, cx2).sub_(torch.maximum(x1, cx1)).clamp_(min=0)
    height = torch.minimum(y2, cy2).sub_(torch.maximum(y1, cy1)).clamp_(min=0)
    intersection = width.mul_(height)
    return intersection / (((x2 - x1) * (y2 - y1)) + ((cx2 - cx1) * (cy2 - cy1))).sub_(intersection)


def _settle(hits: Tensor) -> Tensor:
    """Say which boxes of a block are kept, (R,), if ``hits`` (R, R) says whom each would suppress, always later ones.

    Each round settles at least one box more, and most blocks need three or four.
    """
    stays = torch.ones(len(hits), dtype=torch.bool, device=hits.device)
    while True:
        again = ~(hits & stays[:, None]).any(0)
        if torch.equal(again, stays):
            return stays
        stays = again
