"""Cases of the bias and GELU between the two products of an MLP; the unit is one row of the hidden width.

Letters: F hidden width.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_ROWS = 128 * 28 * 28


@dataclass(frozen=True)
class ActivationCase(Case):
    """One call on rows of ``width`` elements."""

    op: ClassVar[str] = "bias_activation"
    unit: ClassVar[str] = "row"

    width: int
    activation: str

    @property
    def name(self) -> str:
        return f"bias_activation F{self.width} {self.activation} {self.dtype} {self.direction}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return (f"_bias_activation_{'fwd' if self.direction == 'forward' else 'bwd'}_kernel",)

    # Forward: hidden in, the activation out. Backward: hidden and the gradient in; its gradient and, for the second
    # product, the activation out.
    @property
    def bytes(self) -> int:
        return (2 if self.direction == "forward" else 4) * self.width * ITEMSIZE[self.dtype]

    def weight(self, kernel: dict[str, Any]) -> Weight:
        rows, columns = (int(kernel["constexprs"][name]) for name in ("ROWS", "BLOCK_F"))
        return Weight(times=ceil(self.width / columns) / rows)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import bias_activation as kernels

        hidden, bias = empty(_ROWS, self.width), empty(self.width, dtype=torch.float32)
        if self.direction == "forward":
            kernels.bias_activation_fwd(hidden, bias, self.activation, False)
        else:
            kernels.bias_activation_bwd(empty(_ROWS, self.width), hidden, bias, self.activation, True, True)


def _cases() -> Iterator[ActivationCase]:
    """Four times Swin-T's and the towers' widths."""
    ways = ("forward", "backward")
    limits = Limits(store_bytes=16, padding=1.25)
    sizes = ((384, "gelu"), (1536, "gelu"), (3072, "gelu"), (1536, "gelu_tanh"), (1536, "quick_gelu"))
    for (width, activation), way in itertools.product(sizes, ways):
        tier = "quick" if (width, activation) == (1536, "gelu") else "full"
        yield ActivationCase(width=width, activation=activation, dtype="bf16", direction=way, limits=limits, tier=tier)
    for dtype, way in itertools.product(("fp16", "fp32"), ways):
        yield ActivationCase(width=1536, activation="gelu", dtype=dtype, direction=way, limits=limits)


ALLOWED: dict[str, dict[str, float]] = {}

CASES = tuple(_cases())
