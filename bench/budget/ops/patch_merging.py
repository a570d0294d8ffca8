"""Cases of Swin's patch merging; the unit is one merged row, 4C in and 2C out.

The library's products of the backward, and the fold of the weights, which runs once a call, are left out.

Letters: C channels of the map · s bytes of an element.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight


@dataclass(frozen=True)
class MergeCase(Case):
    """One call on maps of ``size`` x ``size``; an odd one has tokens without neighbours."""

    op: ClassVar[str] = "patch_merging"
    unit: ClassVar[str] = "row"

    channels: int
    size: int
    batch: int = 128

    @property
    def name(self) -> str:
        return f"patch_merging C{self.channels} {self.dtype} {self.direction}" + " ragged" * (self.size % 2)

    @property
    def kernels(self) -> tuple[str, ...]:
        if self.direction == "forward":
            return ("_patch_merging_fwd_kernel",)
        return ("_patch_merging_gather_kernel", "_patch_merging_scatter_kernel")

    # Forward: 4C in, 2C out; the folded weights stay in the L2 cache. Backward: the gather reads and writes 4C, the
    # scatter reads 2 x 4C and writes 4C.
    @property
    def bytes(self) -> int:
        return (6 if self.direction == "forward" else 20) * self.channels * ITEMSIZE[self.dtype]

    @property
    def flops(self) -> int:
        return 2 * 4 * self.channels * 2 * self.channels if self.direction == "forward" else 0

    # What is measured of a backward has the library's products in it.
    @property
    def sizes(self) -> dict[str, Any] | None:
        if self.direction == "backward":
            return None
        return {"channels": self.channels, "side": self.size, "batch": self.batch}

    def weight(self, kernel: dict[str, Any]) -> Weight:
        constants = {name: int(value) for name, value in kernel["constexprs"].items() if value.isdecimal()}
        if self.direction == "backward":
            return Weight(times=1 / constants["ROWS"], body=True)
        # A program has one of so many runs of columns: one block of them, and a loop over the others of its run.
        row_blocks = ceil(self.batch * ceil(self.size / 2) ** 2 / constants["BLOCK_M"])
        groups = kernel["grid"][0] / row_blocks
        blocks = 2 * self.channels / (constants["BLOCK_N"] + constants["BLOCK_N2"])
        trips = 4 * self.channels / constants["BLOCK_K"]
        early = kernel["num_stages"] - 1
        return Weight(trips, blocks / groups - 1, groups / constants["BLOCK_M"], body=True, early=early)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import patch_merging as kernels

        width = 4 * self.channels
        x, weight = empty(self.batch, self.size, self.size, self.channels), empty(width // 2, width)
        norm_weight, norm_bias = (empty(width, dtype=torch.float32) for _ in range(2))
        tf32 = self.dtype == "tf32"
        if self.direction == "forward":
            kernels.patch_merging_fwd(x, norm_weight, norm_bias, weight, 1e-5, tf32)
            return
        merged = ceil(self.size / 2)
        grad = empty(self.batch, merged, merged, width // 2)
        kernels.patch_merging_bwd(grad, x, norm_weight, norm_bias, weight, [True] * 4, 1e-5, tf32)


def _cases() -> Iterator[MergeCase]:
    """Swin-T's three merges at 224 pixels, and CoSwin-H's; from C = 192 on the product must be what binds."""
    sizes = ((96, 56, "bf16"), (192, 28, "bf16"), (192, 28, "fp16"), (384, 14, "bf16"), (256, 56, "bf16"))
    # Sums of the folded weights and shifts come by 4 bytes, once for each block of columns.
    limits = Limits(of_memory=None, split_rows=None, wide_share=0.7, padding=1.1)
    for channels, size, dtype in sizes:
        case = MergeCase(channels=channels, size=size, dtype=dtype, direction="forward", limits=limits)
        if channels >= 192:
            case = replace(case, limits=replace(limits, tensor_share=0.7))
        yield replace(case, tier="quick" if (channels, dtype) == (192, "bf16") else "full")
    limits = Limits(split_rows=None, wide_share=0.85)
    for channels, size in ((96, 56), (384, 14), (192, 27)):
        yield MergeCase(channels=channels, size=size, dtype="bf16", direction="backward", limits=limits)
    free = Limits(of_memory=None, split_rows=None, wide_share=0.5, stack=256)
    for dtype in ("fp32", "tf32"):
        yield MergeCase(channels=192, size=28, dtype=dtype, direction="forward", limits=free)


# 2C = 384 is cut into blocks of 128 + 64 columns on sm_90, and shared memory binds.
ALLOWED: dict[str, dict[str, float]] = {
    f"patch_merging C192 {dtype} forward": {"tensor_share": 0.62} for dtype in ("bf16", "fp16")
}

CASES = tuple(_cases())
