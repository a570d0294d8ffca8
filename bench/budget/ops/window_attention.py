"""Cases of window attention at the stages of the paper's models; the unit is one window and head.

Which windows there are, and how many are cut by the shift, follows from the size of the map. Of a call's kernels those
that expand the bias and fold its gradient run once whatever the batch is, and are left out.

Letters: N tokens in one window · h heads · d head dim · s bytes of an element.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_KERNELS = {
    (False, "forward"): ("_window_attention_fwd_kernel",),
    (False, "backward"): ("_window_attention_bwd_kernel",),
    (True, "forward"): ("_window_attention_tall_fwd_kernel",),
    (True, "backward"): ("_window_attention_tall_bwd_kernel", "_window_attention_tall_bias_grad_kernel"),
}
_PROGRAM_A_BLOCK = "_window_attention_tall_bias_grad_kernel"
"""The kernel in which each block of rows has a program of its own."""


@dataclass(frozen=True)
class WindowCase(Case):
    """One call: square windows of ``window`` on a map of ``size`` x ``size``."""

    op: ClassVar[str] = "window_attention"
    unit: ClassVar[str] = "window"

    window: int
    head_dim: int
    size: int
    heads: int
    batch: int = 128
    shifted: bool = False
    safe_dots: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.window}x{self.window}", f"d{self.head_dim}", self.dtype, self.direction]
        return " ".join([*words, *["safe"] * self.safe_dots, *["shifted"] * self.shifted])

    @property
    def tokens(self) -> int:
        return self.window**2

    @property
    def tall(self) -> bool:
        """Whether a window has too many rows for one block of them."""
        return self.tokens > 64

    @property
    def kernels(self) -> tuple[str, ...]:
        return _KERNELS[self.tall, self.direction]

    @property
    def loops(self) -> int:
        return 1 + self.shifted

    @property
    def edge_share(self) -> float:
        """How many of the windows are cut by the shift: the last row and the last column of them."""
        across = self.size // self.window
        return 1 - (across - 1) ** 2 / across**2 if self.shifted else 0.0

    # Forward: q, k, v in and the result out, 4 N d. Backward: q, k, v and its gradient in, three gradients out, 7 N d.
    # More than 64 tokens: the forward leaves a float32 statistic a row, the backward reads it and leaves another, and
    # the kernel of the bias gradient reads q, k, v, the gradient and both statistics again. The bias and its gradient
    # stay on the chip, or pass through memory once in many windows, and count for nothing.
    @property
    def bytes(self) -> int:
        streams, statistics = {
            (False, "forward"): (4, 0),
            (False, "backward"): (7, 0),
            (True, "forward"): (4, 1),
            (True, "backward"): (7 + 4, 2 + 2),
        }[self.tall, self.direction]
        return self.tokens * (streams * self.head_dim * ITEMSIZE[self.dtype] + statistics * 4)

    # q k^T and p v, 2 N^2 d each. Backward: q k^T anew, dp, dv, dq and dk; the kernel of the bias gradient computes
    # q k^T and dp once more.
    @property
    def flops(self) -> int:
        products = 2 if self.direction == "forward" else 7 if self.tall else 5
        return products * 2 * self.tokens**2 * self.head_dim

    # One a score, each time that the scores are computed.
    @property
    def exp2(self) -> int:
        return self.tokens**2 * (2 if self.tall and self.direction == "backward" else 1)

    # Heads only share the bias, which the clocks leave out.
    @property
    def sizes(self) -> dict[str, Any] | None:
        if self.safe_dots:
            return None
        shift = self.window // 2 if self.shifted else 0
        return {"window": self.window, "head_dim": self.head_dim, "height": self.size, "shift": shift}

    def weight(self, kernel: dict[str, Any]) -> Weight:
        blocks = int(kernel["constexprs"].get("BLOCKS", 1))
        return Weight(inner=blocks, times=blocks if kernel["name"] == _PROGRAM_A_BLOCK else 1)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import window_attention as kernels

        place, channels = (self.batch, self.size, self.size), self.heads * self.head_dim
        qkv, out = empty(*place, 3 * channels), empty(*place, channels)
        table = empty((2 * self.window - 1) ** 2, self.heads, dtype=torch.float32)
        windows, shift = [self.window] * 2, [self.window // 2 if self.shifted else 0] * 2
        values = (windows, self.heads, shift, self.head_dim**-0.5, "mask", [False, False])
        tf32 = self.dtype == "tf32"
        if self.direction == "forward":
            kernels.window_attention_fwd(qkv, table, None, None, *values, True, tf32=tf32)
            return
        statistics = self.batch * (self.size // self.window) ** 2 * self.heads * self.tokens if self.tall else 0
        kept = empty(statistics, dtype=torch.float32)
        needs = [True, True, False, False]
        kernels.window_attention_bwd(
            out, qkv, table, None, None, kept, needs, *values, tf32=tf32, safe_dots=self.safe_dots
        )


WAYS = ("forward", "backward")
_FORWARD, _BACKWARD = Limits(instructions=400), Limits(instructions=760, stack=63)
_SAFE = Limits(stack=63)
"""The safe form of the backward must only be faster than memory."""
# The tail of 16 rows lies across the warps and is loaded by 8 bytes a thread, the statistics by 4.
_TALL = {"forward": Limits(split_rows=16, wide_share=0.85), "backward": Limits(stack=700, wide_share=0.7)}


def _case(window: int, head_dim: int, dtype: str, direction: str, **rest: Any) -> WindowCase:
    """At 7x7 and 8x8 a first stage of 224 or 256 pixels, at 12x12 one of 384."""
    sizes = {"size": 96, "heads": 4, "batch": 32} if window == 12 else {"size": 8 * window, "heads": 3}
    return WindowCase(window=window, head_dim=head_dim, dtype=dtype, direction=direction, **sizes, **rest)


def _small() -> Iterator[WindowCase]:
    """7x7 and 8x8, d=32, 16 bits: what the models spend their time in. The quick are shifted, and hold both loops."""
    for dtype, window, shifted in itertools.product(("bf16", "fp16"), (7, 8), (False, True)):
        tier = "quick" if dtype == "bf16" and window == 7 and shifted else "full"
        case = _case(window, 32, dtype, "forward", shifted=shifted, limits=_FORWARD, tier=tier)
        yield case
        case = replace(case, direction="backward", limits=_BACKWARD)
        yield case
        # The fault that the safe form avoids is one of Hopper.
        yield replace(case, safe_dots=True, limits=_SAFE, archs=(90,))


def _tall() -> Iterator[WindowCase]:
    """12x12, d=32: images of 384 pixels. The quick one is shifted, and so holds the loop of the other."""
    for dtype, shifted, way in itertools.product(("bf16", "fp16"), (False, True), WAYS):
        tier = "quick" if (dtype, shifted, way) == ("bf16", True, "forward") else "full"
        case = _case(12, 32, dtype, way, shifted=shifted, tier=tier, limits=_TALL[way])
        yield case
        if way == "backward":
            yield replace(case, safe_dots=True, archs=(90,), tier="full")


def _float32() -> Iterator[WindowCase]:
    """float32: exact products are bound by FFMA, and TF32 has no case in the paper, so no floor is promised."""
    free = Limits(stack=256, of_memory=None)
    for dtype, way in itertools.product(("fp32", "tf32"), WAYS):
        tier = "quick" if (dtype, way) == ("fp32", "forward") else "full"
        case = _case(7, 32, dtype, way, limits=free, tier=tier)
        yield from (case, replace(case, shifted=True, tier="full"))
        yield _case(12, 32, dtype, way, limits=replace(_TALL[way], of_memory=None, stack=1000, wide_share=0.5))


def _head_dims() -> Iterator[WindowCase]:
    """Head dims that are in none of the paper's models."""
    for d, way in itertools.product((16, 64, 128), WAYS):
        limits = Limits(stack=256, of_memory=1.0 if d < 128 else None, split_rows=64 if d == 128 else 0)
        case = _case(7, d, "bf16", way, limits=limits)
        yield case
        if way == "backward":
            yield replace(case, safe_dots=True, archs=(90,))
        if d < 128:
            limits = replace(_TALL[way], stack=1200, of_memory=None, wide_share=0.5)
            # On sm_80 the kernels for long windows take 64 channels.
            yield _case(12, d, "bf16", way, limits=limits, archs=(80, 90) if d < 64 else (90,))


ALLOWED: dict[str, dict[str, float]] = {
    **{
        case.replace("16-bit", dtype): limits
        for dtype in ("bf16", "fp16")
        for case, limits in {
            "7x7 d32 16-bit backward safe shifted": {"stack": 128},
            "8x8 d32 16-bit backward safe shifted": {"stack": 152},
            "12x12 d32 16-bit forward": {"stack": 40},
            "12x12 d32 16-bit forward shifted": {"stack": 240, "of_memory": 1.05},
            # 64 rows against 144 keys go through shared memory several times.
            "12x12 d32 16-bit backward": {"of_memory": 1.35},
            "12x12 d32 16-bit backward shifted": {"of_memory": 1.45, "stack": 760},
            "12x12 d32 16-bit backward safe": {"of_memory": 3.2, "stack": 1504},
            "12x12 d32 16-bit backward safe shifted": {"of_memory": 3.4, "stack": 1944},
        }.items()
    },
    "7x7 d16 bf16 backward": {"of_memory": 1.05},
    "7x7 d16 bf16 backward safe": {"of_memory": 1.15},
    # On sm_90 v is copied by 4 bytes, into the order in which HGMMA wants float32.
    "7x7 d32 tf32 forward": {"wide_share": 0.66},
    "7x7 d32 tf32 forward shifted": {"wide_share": 0.66},
    "7x7 d32 tf32 backward shifted": {"stack": 328},
    "12x12 d32 fp32 backward": {"split_rows": 16},
    "12x12 d32 tf32 backward": {"stack": 2056},
}

CASES = (*_small(), *_tall(), *_float32(), *_head_dims())
