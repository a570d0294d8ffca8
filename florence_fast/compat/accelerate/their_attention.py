"""A layer's own attention, called on the windows of a map: what a layer does around that call, in 2-D.

For ``attention=False`` where a library's layer rolls, pads and cuts the map in the same forward in which it norms:
there the rest of the layer can be ours only if the cutting is.

B batch · H W map height and width · C channels · M windows of one map · N tokens in one window
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCKED = -100.0
"""What Swin adds to the logits of two tokens that only the roll has brought into one window."""


def through_windows(x: Tensor, window: int, shift: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Map (B, H, W, C) to the same: ``attend`` maps all windows (B*M, N, C), rolled by ``shift``, filled with zeros."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    grid = x.shape[:3]
    out = attend(x.flatten(0, 2).flatten(1, 2))
    out = out.unflatten(1, (window, window)).unflatten(0, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift:
        out = out.roll((shift, shift), (1, 2))
    return out[:, :height, :width]


def shift_mask(x: Tensor, window: int, shift: int) -> Tensor | None:
    """Give what is added to the logits of the rolled windows of (B, H, W, C): (M, N, N); None without a shift."""
    if not shift:
        return None
    regions = []
    for side in x.shape[1:3]:
        padded = side + -side % window
        place = torch.arange(padded, device=x.device)
        regions.append((place >= padded - shift).long())
    region = regions[0][:, None] * 2 + regions[1]
    region = region.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    return (region[:, :, None] != region[:, None, :]).to(x.dtype) * _BLOCKED
