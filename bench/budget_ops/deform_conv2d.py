"""Cases of the deformable convolution as Dynamic Head has it; the unit is one sample: a tap of an output place.

Left out: the library's product; where samples lie, computed by one thread each; and the gradient of the input, whose
loop is as long as the offsets say.

Letters: CG channels of an offset group · s bytes of an element.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from bench.budget_ops.base import ITEMSIZE, Case, Limits, Weight

_TAPS = 9
_PLACE = 16
"""Bytes of the four pixels of a sample, and of what they weigh."""


@dataclass(frozen=True)
class DeformCase(Case):
    """One call of a modulated 3 x 3 convolution with one offset group, on ``batch`` maps of ``size`` x ``size``."""

    op: ClassVar[str] = "deform_conv2d"
    unit: ClassVar[str] = "sample"

    channels: int
    size: int = 64
    batch: int = 4

    @property
    def name(self) -> str:
        return f"deform_conv2d C{self.channels} {self.dtype} {self.direction}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return (f"_deform_conv2d_sample_{'fwd' if self.direction == 'forward' else 'bwd'}_kernel",)

    # Forward: pixels and weights in, a column of CG out. Backward: the gradient of the column in and four sums out as
    # well. The map is in the L2 cache.
    @property
    def bytes(self) -> int:
        column = self.channels * ITEMSIZE[self.dtype]
        return 2 * _PLACE + column if self.direction == "forward" else 3 * _PLACE + 2 * column

    # Four pixels of the map as well.
    @property
    def accesses(self) -> int:
        return self.bytes + 4 * self.channels * ITEMSIZE[self.dtype]

    def weight(self, kernel: dict[str, Any]) -> Weight:
        return Weight(times=1 / int(kernel["constexprs"]["BLOCK_R"]), body=True)

    def launch(self, empty: Callable[..., Any]) -> None:
        from florence_fast.kernels import deform_conv2d as kernels

        place = (self.size, self.size)
        x, offset = empty(self.batch, *place, self.channels), empty(self.batch, 2 * _TAPS, *place)
        mask, geometry = empty(self.batch, _TAPS, *place), ((3, 3), (1, 1), (1, 1), (1, 1))
        if self.direction == "forward":
            kernels.sample(x, offset, mask, *geometry)
            return
        dcolumns = empty(self.batch, self.size**2, _TAPS, self.channels)
        kernels.sample_gradients(dcolumns, x, offset, mask, *geometry, True)


def _cases() -> Iterator[DeformCase]:
    """256 channels, of which the head's towers are made."""
    # Pixels and weights come by 4 bytes, the same for all lanes of a row.
    limits = Limits(split_rows=None, wide_share=0.75)
    for dtype in ("bf16", "fp16", "fp32"):
        tier = "quick" if dtype == "bf16" else "full"
        yield DeformCase(channels=256, dtype=dtype, direction="forward", limits=limits, tier=tier)
        yield DeformCase(channels=256, dtype=dtype, direction="backward", limits=limits)


ALLOWED: dict[str, dict[str, float]] = {}

CASES = tuple(_cases())
