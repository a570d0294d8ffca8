"""The two-layer perceptron of a block in PyTorch's own operations, and the sizes that verification takes.

Letters: R rows · C channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Draw, Inputs, drawn, row_subject


def draw_mlp(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for a perceptron that is four times as wide inside."""

    def make(normal: Draw) -> dict[str, Tensor]:
        wide = 4 * channels
        return {
            "x": normal(rows, channels),
            "weight1": normal(wide, channels) / channels**0.5,
            "bias1": normal(wide),
            "weight2": normal(channels, wide) / wide**0.5,
            "bias2": normal(channels),
        }

    return drawn(make, (rows, channels), set())


def plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers with a GELU between them."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


_SMALL = Case("7x24", draw_mlp(7, 24))
SUBJECTS = {
    "mlp": row_subject(
        "mlp",
        draw_mlp,
        plain_mlp,
        _SMALL.given("tanh", activation="gelu_tanh"),
        _SMALL.given("quick_gelu", activation="quick_gelu"),
        _SMALL.given("no biases", bias1=None, bias2=None),
        autocast=("x", "weight1", "bias1", "weight2", "bias2"),
    )
}
