"""Cases of the ops that walk over rows and multiply nothing: LayerNorm, division by the length; the unit is a row.

What a channel has, weights and their gradients, passes through memory once a call and counts for nothing.

Letters: R rows · C channels.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_ROWS = 128 * 28 * 28
_SAMPLES = 128


@dataclass(frozen=True)
class RowCase(Case):
    """One call on rows of ``channels`` elements."""

    unit: ClassVar[str] = "row"

    channels: int

    @property
    @abstractmethod
    def streams(self) -> int:
        """How many tensors of the size of x pass through memory."""

    @property
    def name(self) -> str:
        return f"{self.op} C{self.channels} {self.dtype} {self.direction}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return (f"_{self.op}_{'fwd' if self.direction == 'forward' else 'bwd'}_kernel",)

    @property
    def bytes(self) -> int:
        return self.streams * self.channels * ITEMSIZE[self.dtype]

    def weight(self, kernel: dict[str, Any]) -> Weight:
        return Weight(times=1 / int(kernel["constexprs"]["ROWS"]))


@dataclass(frozen=True)
class LayerNormCase(RowCase):
    """``form`` is plain, residual (a sum comes before the norm and is returned) or drop-path (a factor a sample)."""

    op: ClassVar[str] = "layer_norm"

    form: str = "plain"

    @property
    def name(self) -> str:
        return " ".join([super().name, *[self.form] * (self.form != "plain")])

    @property
    def measured_as(self) -> str:
        return "layer_norm_residual" if self.form == "residual" else self.op

    @property
    def sizes(self) -> dict[str, Any] | None:
        return None if self.form == "drop-path" else {"channels": self.channels}

    # Forward: x in, the norm out; with a residual two in, two out. Backward: what was normalised and the gradient of
    # the norm in, one gradient out; with a residual the gradient of the sum in; with drop path two gradients out.
    @property
    def streams(self) -> int:
        return {
            "forward": {"plain": 2, "residual": 4, "drop-path": 4},
            "backward": {"plain": 3, "residual": 4, "drop-path": 5},
        }[self.direction][self.form]

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import layer_norm as kernels

        x, other = (empty(_ROWS, self.channels) for _ in range(2))
        weight, bias = (empty(self.channels, dtype=torch.float32) for _ in range(2))
        added = None if self.form == "plain" else other
        scale = empty(_SAMPLES, dtype=torch.float32) if self.form == "drop-path" else None
        if self.direction == "forward":
            kernels.layer_norm_fwd(x, added, scale, weight, bias, 1e-5, x.dtype, x.dtype)
            return
        dx = x.dtype if scale is not None else None
        kernels.layer_norm_bwd(empty(_ROWS, self.channels), added, x, scale, weight, x.dtype, dx, True, 1e-5)


@dataclass(frozen=True)
class NormalizeCase(RowCase):
    """Rows divided by their length."""

    op: ClassVar[str] = "l2_normalize"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"channels": self.channels}

    # Forward: x in, the result out. Backward: x and the gradient in, a gradient out.
    @property
    def streams(self) -> int:
        return {"forward": 2, "backward": 3}[self.direction]

    def launch(self, empty: Callable[..., Any]) -> None:
        from florence_fast.kernels import l2_normalize as kernels

        x = empty(_ROWS, self.channels)
        if self.direction == "forward":
            kernels.l2_normalize_fwd(x, 1e-12, x.dtype)
        else:
            kernels.l2_normalize_bwd(empty(_ROWS, self.channels), x, 1e-12)


WAYS = ("forward", "backward")
# Long rows lie across the warps. Of what a row loads only the factor of its sample is not wide.
_PLAIN = Limits(split_rows=None, store_bytes=16, padding=1.5)
_LIMITS = {"plain": _PLAIN, "residual": _PLAIN, "drop-path": replace(_PLAIN, wide_share=0.85)}


def _cases() -> Iterator[RowCase]:
    """C from Swin's first stage to the towers' width, 200 for a multiple of 8 that is one of nothing else."""
    quick = {(96, "forward", "plain"), (768, "forward", "residual"), (96, "backward", "plain")}
    plain = itertools.product((96, 192, 200, 256, 384, 512, 768, 1024), ("plain",))
    joined = itertools.product((96, 768), ("residual", "drop-path"))
    for (channels, form), way in itertools.product((*plain, *joined), WAYS):
        case = LayerNormCase(channels=channels, dtype="bf16", direction=way, form=form, limits=_LIMITS[form])
        yield replace(case, tier="quick" if (channels, way, form) in quick else "full")
    for dtype, way in itertools.product(("fp16", "fp32"), WAYS):
        yield LayerNormCase(channels=768, dtype=dtype, direction=way, limits=_PLAIN)
    sizes = ((96, "bf16"), (200, "bf16"), (512, "bf16"), (1024, "bf16"), (512, "fp32"))
    for (channels, dtype), way in itertools.product(sizes, WAYS):
        case = NormalizeCase(channels=channels, dtype=dtype, direction=way, limits=_PLAIN)
        yield replace(case, tier="quick" if (channels, dtype) == (512, "bf16") else "full")


ALLOWED: dict[str, dict[str, float]] = {}

CASES = tuple(_cases())
