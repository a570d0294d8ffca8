"""What the static budget compiles: each case is one call of an op at a stage of the paper's models, with its limits.

Everything is counted for one window and head. Bytes, FLOPs and exponentials come from formulas; which windows there
are, and how many are cut by the shift, from the sizes of the map.

Letters: N tokens in one window · h heads · d head dim · s bytes of an element.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
# Kernels that loop over windows, and whether each block of rows has a program of its own. The others of a call, which
# expand the bias and fold its gradient, run once whatever the batch is.
KERNELS = {
    (False, "forward"): {"_window_attention_fwd_kernel": False},
    (False, "backward"): {"_window_attention_bwd_kernel": False},
    (True, "forward"): {"_window_attention_tall_fwd_kernel": False},
    (True, "backward"): {"_window_attention_tall_bwd_kernel": False, "_window_attention_tall_bias_grad_kernel": True},
}


@dataclass(frozen=True)
class Limits:
    """What the compiled code of a case must keep; None where the case has no such rule."""

    instructions: int | None = None
    """Of a warp for an inner window."""
    stack: int | None = 0
    """Bytes of a thread, at most."""
    of_memory: float | None = 1.0
    """What the busiest unit may need, as a part of the clocks that memory takes."""
    split_rows: int = 0
    """Tiles of so few rows may have the keys of a row over several warps."""
    wide_share: float = 1.0
    """How much of what a window loads from global memory comes in loads of 16 bytes, by bytes."""


@dataclass(frozen=True)
class Case:
    """One call: square windows of ``window`` on a map of ``size`` x ``size``."""

    window: int
    head_dim: int
    dtype: str
    """bf16, fp16, fp32 or tf32, which is fp32 whose products may round their factors."""
    direction: str
    size: int
    heads: int
    batch: int = 128
    shifted: bool = False
    safe_dots: bool = False
    limits: Limits = Limits()
    tier: str = "full"
    archs: tuple[int, ...] = (80, 90)

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
    def kernels(self) -> dict[str, bool]:
        """The kernels of the hot path, and whether each block of rows has a program of its own."""
        return KERNELS[self.tall, self.direction]

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


WAYS = ("forward", "backward")
FORWARD, BACKWARD = Limits(instructions=400), Limits(instructions=760, stack=63)
SAFE = Limits(stack=63)
"""The safe form of the backward must only be faster than memory."""
# The tail of 16 rows lies across the warps and is loaded by 8 bytes a thread, the statistics by 4.
TALL = {"forward": Limits(split_rows=16, wide_share=0.85), "backward": Limits(stack=700, wide_share=0.7)}


def _small() -> Iterator[Case]:
    """7x7 and 8x8, d=32, 16 bits: what the models spend their time in."""
    for dtype, window, shifted in itertools.product(("bf16", "fp16"), (7, 8), (False, True)):
        main = dtype == "bf16" and window == 7
        case = Case(window, 32, dtype, "forward", 8 * window, 3, shifted=shifted, limits=FORWARD)
        case = replace(case, tier="quick" if main or not shifted else "full")
        yield case
        case = replace(case, direction="backward", limits=BACKWARD)
        yield case
        # The fault that the safe form avoids is one of Hopper.
        yield replace(case, safe_dots=True, limits=SAFE, archs=(90,), tier="quick" if main else "full")


def _tall() -> Iterator[Case]:
    """12x12, d=32: pictures of 384 pixels."""
    for dtype, shifted, way in itertools.product(("bf16", "fp16"), (False, True), WAYS):
        tier = "quick" if dtype == "bf16" else "full"
        case = Case(12, 32, dtype, way, 96, 4, 32, shifted=shifted, tier=tier, limits=TALL[way])
        yield case
        if way == "backward":
            yield replace(case, safe_dots=True, archs=(90,), tier="full")


def _float32() -> Iterator[Case]:
    """float32: exact products are bound by FFMA, and TF32 has no case in the paper, so no floor is promised."""
    free = Limits(stack=256, of_memory=None)
    for dtype, way in itertools.product(("fp32", "tf32"), WAYS):
        case = Case(7, 32, dtype, way, 56, 3, limits=free, tier="quick")
        yield from (case, replace(case, shifted=True, tier="full"))
        limits = replace(TALL[way], of_memory=None, stack=1000, wide_share=0.5)
        yield Case(12, 32, dtype, way, 96, 4, 32, limits=limits)


def _head_dims() -> Iterator[Case]:
    """Head dims that are in none of the paper's models."""
    for d, way in itertools.product((16, 64, 128), WAYS):
        limits = Limits(stack=256, of_memory=1.0 if d < 128 else None, split_rows=64 if d == 128 else 0)
        case = Case(7, d, "bf16", way, 56, 3, limits=limits)
        yield case
        if way == "backward":
            yield replace(case, safe_dots=True, archs=(90,))
        if d < 128:
            limits = replace(TALL[way], stack=1200, of_memory=None, wide_share=0.5)
            yield Case(12, d, "bf16", way, 96, 4, 32, limits=limits)


# What is known to break a limit, and how far it may go; --check lists each. A line goes when its kernel is mended.
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


def select(tier: str, substring: str = "") -> list[Case]:
    """Return the cases of a tier, "full" holding the "quick" ones too, whose name contains ``substring``."""
    return [case for case in CASES if tier in ("full", case.tier) and substring in case.name]
