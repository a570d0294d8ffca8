"""Layer norm as models without this package compute it, and the sizes that verification takes.

Letters: R rows · C channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Draw, Inputs, drawn, row_subject


def draw_layer_norm(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for rows whose mean is not zero."""

    def make(normal: Draw) -> dict[str, Tensor]:
        return {"x": 1 + 2 * normal(rows, channels), "weight": 1 + normal(channels) / 4, "bias": normal(channels)}

    return drawn(make, (rows, channels), {"weight", "bias"})


def draw_layer_norm_residual(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return the same for the form that adds a residual first and returns the sum and the norm."""

    def make(normal: Draw) -> dict[str, Tensor]:
        rows_of_both = {"x": normal(rows, channels), "residual": 1 + 2 * normal(rows, channels)}
        return rows_of_both | {"weight": 1 + normal(channels) / 4, "bias": normal(channels)}

    return drawn(make, (rows, channels), {"weight", "bias"}, outs=2)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise in the dtype of ``x``."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))


def plain_layer_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add and normalise in the dtype of ``x``."""
    total = x + residual
    return total, plain_layer_norm(total, weight, bias)


_RESIDUAL = Case("residual", draw_layer_norm_residual(7, 24))
SUBJECTS = {
    "layer_norm": row_subject(
        "layer_norm",
        draw_layer_norm,
        plain_layer_norm,
        Case("7x24", draw_layer_norm(7, 24)).given("no weights", weight=None, bias=None),
        _RESIDUAL,
        _RESIDUAL.given("drop path", residual_scale=torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25, 1.25, 1.25])),
    )
}
