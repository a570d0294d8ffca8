"""Non-maximum suppression as a loop over boxes, and boxes for it.

Letters: N boxes.
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast.ops.cases import Inputs, generator


def setup(count: int, classes: int | None, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw boxes of whole pixels around a few objects, and scores; with ``classes`` a class for each.

    Areas of whole pixels are exact in float32 and float64 alike, and so is whether a pair overlaps by more than half.
    """
    draw, wide = generator(device, seed), torch.promote_types(dtype, torch.float32)
    objects = torch.randint(16, 600, (max(1, count // 16), 4), generator=draw, device=device)
    chosen = objects[torch.randint(len(objects), (count,), generator=draw, device=device)]
    chosen = chosen + torch.randint(-8, 9, (count, 4), generator=draw, device=device)
    corners, sides = chosen[:, :2], chosen[:, 2:].clamp(min=1) // 4 + 1
    tensors = {
        "boxes": torch.cat((corners, corners + sides), 1).to(wide),
        "scores": torch.rand(count, generator=draw, device=device, dtype=wide),
    }
    options: dict[str, Any] = {"iou_threshold": 0.5}
    if classes is not None:
        options["idxs"] = torch.randint(classes, (count,), generator=draw, device=device)
    return Inputs(tensors, options, None)


def eager(boxes: Tensor, scores: Tensor, *, iou_threshold: float, idxs: Tensor | None = None) -> Tensor:
    """Compute all N x N overlaps and go through the boxes one by one, best first."""
    order = scores.argsort(descending=True, stable=True)
    ordered = boxes[order]
    sides = (
        torch.minimum(ordered[:, None, 2:], ordered[:, 2:]) - torch.maximum(ordered[:, None, :2], ordered[:, :2])
    ).clamp(min=0)
    shared, area = sides.prod(-1), (ordered[:, 2:] - ordered[:, :2]).prod(-1)
    hits = shared / (area[:, None] + area - shared) > iou_threshold
    if idxs is not None:
        hits &= idxs[order][:, None] == idxs[order]
    hits, kept = hits.cpu(), torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~hits[i, i + 1 :]
    return order[kept.to(order.device)]
