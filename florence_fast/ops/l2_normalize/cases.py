"""Normalisation to length 1 by PyTorch, and the sizes that verification takes.

Letters: R rows · C channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Inputs, drawn, row_subject


def draw_l2_normalize(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for rows of any length."""
    return drawn(lambda normal: {"x": normal(rows, channels)}, (rows, channels), set())


def plain_l2_normalize(x: Tensor) -> Tensor:
    """Normalise in the dtype of ``x``."""
    return F.normalize(x, dim=-1)


SUBJECTS = {"l2_normalize": row_subject("l2_normalize", draw_l2_normalize, plain_l2_normalize)}
