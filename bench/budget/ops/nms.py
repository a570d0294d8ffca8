"""Cases of the suppression of overlapping boxes; the unit is one word: 32 boxes against 32 that come later, as bits.

All boxes are of one class, and half of the words stand above the diagonal. The second kernel is one program that goes
from word to word; its clocks are latency, of which the budget knows nothing, and its limit is on what it loads.

Letters: N boxes · W words of 32 bits that hold one bit a box.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.budget.ops.base import Case, Limits, Weight

_BOXES, _WARPS = 32, 4


@dataclass(frozen=True)
class NmsCase(Case):
    """One call on ``count`` boxes; ``direction`` is the kernel, for the op has no backward."""

    op: ClassVar[str] = "nms"
    unit: ClassVar[str] = "word"

    count: int = 8192

    @property
    def name(self) -> str:
        return f"nms N{self.count} {self.dtype} {self.direction}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return (f"_nms_{self.direction}_kernel",)

    # Overlaps are written, and read again by the kernel that settles them. The boxes stay in the cache.
    @property
    def bytes(self) -> int:
        return _BOXES * 4

    # Each warp loads four coordinates of every later box.
    @property
    def accesses(self) -> int:
        return self.bytes + (_WARPS * _BOXES * 16 if self.direction == "overlap" else 0)

    def weight(self, kernel: dict[str, Any]) -> Weight:
        words, block = self.count // _BOXES, int(kernel["constexprs"]["BLOCK_WORDS"])
        if self.direction == "overlap":
            return Weight(inner=block, times=1 / block, body=True)
        # Each trip settles 32 boxes and walks over the words behind them, half of all on average.
        return Weight(inner=words / 2 / block, times=2 / words)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import nms as kernels

        kernels.nms_kept(empty(self.count, 4), empty(self.count, dtype=torch.int32), 0.5)


def _cases() -> Iterator[NmsCase]:
    """Both kernels at the boxes of one image of a crowd: what comes from the cache comes by 4 bytes."""
    limits = Limits(of_memory=None, wide_share=0.0)
    # An exact division takes a subroutine for numbers near the ends of float32's range: one a pair, 8 pairs a lane.
    overlap = replace(limits, instructions=400, calls=8)
    yield NmsCase(dtype="fp32", direction="overlap", limits=overlap, tier="quick")
    yield NmsCase(dtype="fp32", direction="settle", limits=replace(limits, instructions=7))


ALLOWED: dict[str, dict[str, float]] = {}

CASES = tuple(_cases())
