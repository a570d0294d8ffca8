"""Cases of the contrastive losses, over softmax and over sigmoid; the unit is one tile of 128 x 128 logits, whatever
tiles the kernels take.

Rows and columns are so many that features pass through memory once in many tiles. Here they count as read once a call,
or once a chunk of the gradient; that they come from the L2 cache for each tile anew the budget does not know.

Letters: D embedding dim · s bytes of an element.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_TILE = 128
_SCRATCH = 1 << 30
"""Bytes for the statistics of all blocks of rows at a time."""


@dataclass(frozen=True)
class ContrastiveCase(Case):
    """One call on ``batch`` images and as many texts; the gradient works on chunks of ``chunk`` of each."""

    op: ClassVar[str] = "contrastive_loss"
    unit: ClassVar[str] = "tile"

    depth: int
    batch: int = 32768
    chunk: int = 8192

    @property
    def name(self) -> str:
        return f"{self.op} D{self.depth} {self.dtype} {self.direction}"

    @property
    def kernels(self) -> tuple[str, ...]:
        if self.direction == "forward":
            return ("_contrastive_loss_fwd_kernel",)
        return ("_contrastive_loss_grad_kernel",) * 2  # two forms, of which one returns at once

    # Forward: the features, and a float32 maximum and sum of each column for each block of rows. Gradient: the
    # features of a chunk, and the gradient of each logit.
    @property
    def bytes(self) -> int:
        side = self.batch if self.direction == "forward" else self.chunk
        features = 2 * side * self.depth * ITEMSIZE[self.dtype] // (side // _TILE) ** 2
        return features + (_TILE * 8 if self.direction == "forward" else _TILE**2 * ITEMSIZE[self.dtype])

    @property
    def flops(self) -> int:
        return 2 * _TILE**2 * self.depth

    # The forward has one for the row and one for the column of a logit, the gradient one for both.
    @property
    def exp2(self) -> int:
        return _TILE**2 * (2 if self.direction == "forward" else 1)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"dim": self.depth, "batch": 65536, "names": None}

    def weight(self, kernel: dict[str, Any]) -> Weight | None:
        constants = kernel["constexprs"]
        if constants.get("FAR_APART") == "True":
            return None
        tiles = _TILE**2 / (int(constants["BLOCK_R"]) * int(constants["BLOCK_N"]))
        trips = self.depth / int(constants["BLOCK_D"])
        # A program of the forward walks over tiles; one of the gradient has a tile, and no loop but that over D.
        return Weight(inner=trips, times=tiles, body=self.direction == "gradient", early=kernel["num_stages"] - 1)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import contrastive_loss as kernels

        def numbers(*sizes: int) -> torch.Tensor:
            return empty(*sizes, dtype=torch.float32)

        rows, cols, tf32 = empty(self.batch, self.depth), empty(self.batch, self.depth), self.dtype == "tf32"
        labels = [empty(self.batch, dtype=torch.int32) for _ in range(2)]
        if self.direction == "forward":
            kernels.contrastive_loss_fwd(rows, cols, numbers(), *labels, _SCRATCH, tf32)
            return
        statistics = (numbers(2), *(numbers(self.batch) for _ in range(5)), *labels)
        span, grad = (0, self.chunk), empty(self.chunk, self.chunk)
        kernels.contrastive_loss_grad(rows, cols, numbers(), statistics, span, span, grad, tf32)


@dataclass(frozen=True)
class SigmoidCase(ContrastiveCase):
    """The same of the sigmoid loss, which has one exponential a logit and no statistics of columns."""

    op: ClassVar[str] = "sigmoid_loss"

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("_sigmoid_loss_fwd_kernel" if self.direction == "forward" else "_sigmoid_loss_grad_kernel",)

    @property
    def bytes(self) -> int:
        side = self.batch if self.direction == "forward" else self.chunk
        features = 2 * side * self.depth * ITEMSIZE[self.dtype] // (side // _TILE) ** 2
        return features + (0 if self.direction == "forward" else _TILE**2 * ITEMSIZE[self.dtype])

    @property
    def exp2(self) -> int:
        return _TILE**2

    @property
    def sizes(self) -> dict[str, Any]:
        return {"dim": self.depth, "batch": 16384, "names": None}

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import sigmoid_loss as kernels

        rows, cols, tf32 = empty(self.batch, self.depth), empty(self.batch, self.depth), self.dtype == "tf32"
        scale, bias = (empty(dtype=torch.float32) for _ in range(2))
        labels = [empty(self.batch, dtype=torch.int32) for _ in range(2)]
        if self.direction == "forward":
            kernels.sigmoid_loss_fwd(rows, cols, scale, bias, *labels, tf32)
            return
        span, grad, drow = (0, self.chunk), empty(self.chunk, self.chunk), empty(self.batch, dtype=torch.float32)
        kernels.sigmoid_loss_grad(rows, cols, scale, bias, drow, *labels, span, span, grad, tf32)


def _cases() -> Iterator[ContrastiveCase]:
    """16 bits at the widths of the paper's and of CLIP's towers; float32 is bound by its products and promises less."""
    # A row of logits lies over several warps on sm_80; what the gradient loads but features comes by 4 bytes.
    limits = Limits(of_memory=None, tensor_share=0.7, split_rows=_TILE, wide_share=0.75, padding=1.25)
    for (depth, dtype), way in itertools.product(
        ((512, "bf16"), (768, "bf16"), (1024, "bf16"), (512, "fp16")), ("forward", "gradient")
    ):
        tier = "quick" if depth == 512 and dtype == "bf16" else "full"
        yield ContrastiveCase(depth=depth, dtype=dtype, direction=way, limits=limits, tier=tier)
    for dtype, way in itertools.product(("fp32", "tf32"), ("forward", "gradient")):
        yield ContrastiveCase(depth=512, dtype=dtype, direction=way, limits=replace(limits, tensor_share=None))
    for (depth, dtype), way in itertools.product(
        ((512, "bf16"), (768, "bf16"), (512, "fp16")), ("forward", "gradient")
    ):
        tier = "quick" if depth == 512 and dtype == "bf16" and way == "gradient" else "full"
        yield SigmoidCase(depth=depth, dtype=dtype, direction=way, limits=limits, tier=tier)


ALLOWED: dict[str, dict[str, float]] = {
    # Triton 3.6.0 spills two registers; the labels of a tile's columns are loaded one by one.
    f"contrastive_loss {size} gradient": {"stack": 16, "wide_share": 0.75}
    for size in ("D512 bf16", "D768 bf16", "D1024 bf16", "D512 fp16")
}

CASES = tuple(_cases())
