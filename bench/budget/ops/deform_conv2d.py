"""Cases of the deformable convolution as Dynamic Head has it; the unit is one sample: a tap of an output place.

Left out: the library's product, and the sort of the samples by pixel. The gradient of the input is gathered in a loop
as long as the offsets say; here every pixel has as many samples as there are taps.

Letters: CG channels of an offset group · s bytes of an element.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_KERNELS = {
    "forward": "_deform_conv2d_sample_fwd_kernel",
    "backward": "_deform_conv2d_sample_bwd_kernel",
    "gather": "_deform_conv2d_gather_kernel",
    "locate": "_deform_conv2d_locate_kernel",
    "place": "_deform_conv2d_place_grad_kernel",
}
_TAPS = 9
_PLACE = 16
"""Bytes of the four pixels of a sample, and of what they weigh."""
_ORDER = 8
"""Bytes of a sample's number in the order of pixels."""


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
        return (_KERNELS[self.direction],)

    # Forward: pixels and weights in, a column of CG out. Backward: the gradient of the column in and four sums out as
    # well. Gather: that gradient in with the weights and the order, and a ninth of a pixel's gradient out. What is read
    # for four samples or pixels is in the L2 cache three times: the map, the gathered columns.
    @property
    def bytes(self) -> int:
        column = self.channels * ITEMSIZE[self.dtype]
        return {
            "forward": 2 * _PLACE + column,
            "backward": 3 * _PLACE + 2 * column,
            "gather": _PLACE + _ORDER + column + column // _TAPS,
            "locate": 3 * ITEMSIZE[self.dtype] + 2 * _PLACE,
            "place": 6 * ITEMSIZE[self.dtype] + _PLACE,
        }[self.direction]

    @property
    def accesses(self) -> int:
        column = self.channels * ITEMSIZE[self.dtype]
        return self.bytes + {"forward": 4 * column, "backward": 4 * column, "gather": 3 * (column + _ORDER)}.get(
            self.direction, 0
        )

    def weight(self, kernel: dict[str, Any]) -> Weight:
        constants = kernel["constexprs"]
        if self.direction == "gather":
            # A pixel has as many samples as there are taps, and each is of four pixels, in bins around each of these.
            block, parts = int(constants["BLOCK_J"]), ceil(self.channels / (2 * int(constants["BLOCK_C"])))
            return Weight(inner=ceil(4 * _TAPS / block), times=parts / _TAPS, body=True)
        return Weight(times=1 / int(constants["BLOCK_R"]), body=True)

    def launch(self, empty: Callable[..., Any]) -> None:
        from florence_fast.kernels import deform_conv2d as kernels

        place = (self.size, self.size)
        x, offset = empty(self.batch, *place, self.channels), empty(self.batch, 2 * _TAPS, *place)
        mask, geometry = empty(self.batch, _TAPS, *place), ((3, 3), (1, 1), (1, 1), (1, 1))
        if self.direction == "forward":
            kernels.sample(x, offset, mask, *geometry)
            return
        dcolumns = empty(self.batch, self.size**2, _TAPS, self.channels)
        if self.direction == "gather":
            kernels.input_gradient(dcolumns, place, offset, mask, *geometry)
            return
        kernels.sample_gradients(dcolumns, x, offset, mask, *geometry, True)


def _cases() -> Iterator[DeformCase]:
    """256 channels, of which the head's towers are made."""
    # Pixels and weights come by 4 bytes, the same for all lanes of a row.
    limits = Limits(split_rows=None, wide_share=0.75)
    for dtype in ("bf16", "fp16", "fp32"):
        tier = "quick" if dtype == "bf16" else "full"
        yield DeformCase(channels=256, dtype=dtype, direction="forward", limits=limits, tier=tier)
        yield DeformCase(channels=256, dtype=dtype, direction="backward", limits=limits)
        yield DeformCase(channels=256, dtype=dtype, direction="gather", limits=limits)
    # A thread has a sample: four numbers of 4 bytes, and offsets of an element.
    narrow = replace(limits, wide_share=0.0, load_bytes=2, store_bytes=2)
    for way in ("locate", "place"):
        yield DeformCase(channels=256, dtype="bf16", direction=way, limits=narrow)


ALLOWED: dict[str, dict[str, float]] = {
    # A warp adds a pixel's samples 8 at a time, 36 in five trips, and 16 bits cost it a conversion for each number.
    f"deform_conv2d C256 {dtype} gather, sm_90": {"of_memory": of_memory}
    for dtype, of_memory in (("bf16", 1.47), ("fp16", 1.34))
}

CASES = tuple(_cases())
