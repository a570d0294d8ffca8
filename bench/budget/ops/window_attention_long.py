"""Cases of window attention for windows in 3-D, of more than 144 tokens, and by cosines; the unit is a window and head.

From some hundred tokens on exponentials take longer than memory, so the floor is theirs: 16 a clock. Left out are the
kernels that run once whatever the batch is: those of the bias, and the list of the windows' tokens.

Letters: N tokens in one window · h heads · d head dim · s bytes of an element.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight

_BIAS_GRADIENT = "_window_attention_long_bias_grad_kernel"
_KERNELS = {
    "forward": ("_window_attention_long_fwd_kernel",),
    "backward": ("_window_attention_long_dq_kernel", "_window_attention_long_dkdv_kernel", _BIAS_GRADIENT),
}


@dataclass(frozen=True)
class LongWindowCase(Case):
    """One call: windows of ``window`` on a map of ``size``, each (T, H, W), or (H, W) in 2-D."""

    op: ClassVar[str] = "window_attention"
    unit: ClassVar[str] = "window"

    window: tuple[int, ...]
    size: tuple[int, ...]
    heads: int = 3
    batch: int = 32
    head_dim: int = 32
    shifted: bool = False
    cosine: bool = False

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.window)), f"d{self.head_dim}", self.dtype, self.direction]
        return " ".join([*words, *["cosine"] * self.cosine, *["shifted"] * self.shifted])

    @property
    def tokens(self) -> int:
        return math.prod(self.window)

    @property
    def kernels(self) -> tuple[str, ...]:
        return _KERNELS[self.direction]

    @property
    def loops(self) -> int:
        return 1 + self.shifted

    @property
    def edge_share(self) -> float:
        """How many of the windows are cut by the shift: the last ones of each axis that has more than one."""
        across = [s // w for s, w in zip(self.size, self.window, strict=True)]
        return 1 - math.prod(max(n - 1, 1) for n in across) / math.prod(across) if self.shifted else 0.0

    # Forward: q, k, v in and the result out, 4 N d, and a float32 statistic a row. Backward: q, k, v and its gradient
    # in by each of three kernels, and three gradients out, (5 + 6 + 4) N d; a statistic is read by each, the other is
    # written by the first and read by the two behind it. The bias and the list of places stay in the L2 cache.
    @property
    def bytes(self) -> int:
        streams, statistics = (4, 1) if self.direction == "forward" else (15, 6)
        return self.tokens * (streams * self.head_dim * ITEMSIZE[self.dtype] + statistics * 4)

    # q k^T and p v, 2 N^2 d each. Backward: each of three kernels has q k^T and dp. dq costs two products more, for p
    # and for p (dp - c); dk and dv one each.
    @property
    def flops(self) -> int:
        return (2 if self.direction == "forward" else 4 + 4 + 2) * 2 * self.tokens**2 * self.head_dim

    # One a score, each time that the scores are computed.
    @property
    def exp2(self) -> int:
        return self.tokens**2 * (1 if self.direction == "forward" else 3)

    @property
    def shift(self) -> list[int]:
        """Half a window, where an axis has more than one."""
        return [w // 2 if self.shifted and s > w else 0 for s, w in zip(self.size, self.window, strict=True)]

    @property
    def measured_as(self) -> str:
        return "window_attention_3d" if len(self.window) > 2 else "window_attention" + "_cosine" * self.cosine

    # A window and its shift are one number in 2-D. Heads only share the bias, which the clocks leave out.
    @property
    def sizes(self) -> dict[str, Any]:
        names = ("frames", "height", "width")[-len(self.size) :]
        window, shift = list(self.window), self.shift
        if len(window) == 2:
            window, shift = window[0], shift[0]
        return {**dict(zip(names, self.size, strict=True)), "window": window, "shift": shift, "head_dim": self.head_dim}

    def weight(self, kernel: dict[str, Any]) -> Weight:
        constants = kernel["constexprs"]
        blocks, chunks, tail = (int(constants[name]) for name in ("BLOCKS", "CHUNKS", "TAIL"))
        last = int(constants.get("LAST", 0))
        if kernel["name"] == _BIAS_GRADIENT:
            # A program has a tile and walks over windows; for those of the last rows and of the tail there are
            # loops of their own; 16 rows of a wide tile cost more than 64 of a narrow one.
            parts = [blocks * chunks, *([chunks] if last else []), *([blocks] if tail else [])]
            return Weight(parts=(*parts, *([1] if last and tail else [])))
        # A program has a window. It walks over blocks of rows, and each block over chunks, where none was unrolled:
        # of dq the first chunk is, and all are where the keys, or queries, stay in shared memory. The last rows are
        # outside of the loop.
        if not any(loop["children"] for loop in kernel["loops"]):
            return Weight(inner=blocks, body=True)
        return Weight(inner=chunks - ("_dq_" in kernel["name"]), outer=blocks, body=True)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import window_attention as kernels

        def numbers(*sizes: int) -> torch.Tensor:
            return empty(*sizes, dtype=torch.float32)

        place, channels = (self.batch, *self.size), self.heads * self.head_dim
        qkv, out = empty(*place, 3 * channels), empty(*place, channels)
        table = numbers(math.prod(2 * w - 1 for w in self.window), self.heads)
        cyclic, logit_scale = [False] * len(self.size), numbers(self.heads) if self.cosine else None
        values = (self.window, self.heads, self.shift, self.head_dim**-0.5, "mask", cyclic)
        if self.direction == "forward":
            kernels.window_attention_fwd(qkv, table, None, None, *values, True, logit_scale=logit_scale)
            return
        kept = numbers(self.batch * math.prod(self.size) * self.heads)
        needs = [True, True, False, False, self.cosine]
        kernels.window_attention_bwd(out, qkv, table, None, None, kept, needs, *values, logit_scale=logit_scale)


_SIZES = {
    (8, 7, 7): (16, 56, 56),
    (16, 16): (64, 64),
    (24, 24): (96, 96),
    (16, 7, 7): (16, 56, 56),
}
"""Windows, and a map of them at the first stage: Video Swin's images of 224 pixels, Swin V2's of 256 and 384."""
_TILE = 64 * 64


def _limits(tokens: int, direction: str) -> Limits:
    """At most so many instructions for each 64 x 64 scores of a window, whatever a tail and the last rows add.

    On sm_90 issue binds, so that the floor of the exponentials says more.
    """
    per_tile, stack = (400, 0) if direction == "forward" else (3 * 560, 32)
    # The second kernel of the backward has keys by rows, and the statistics of a row for each of a thread's columns.
    wide_share = 0.9 if direction == "forward" else 0.4
    instructions = per_tile * tokens**2 // _TILE
    # Sixteen last rows have their keys over four warps.
    return Limits(
        instructions=instructions, stack=stack, of_memory=None, of_exp2=1.15, split_rows=16, wide_share=wide_share
    )


def _cases() -> Iterator[LongWindowCase]:
    """d=32. What is quick is 8x7x7 in bfloat16."""
    for way in _KERNELS:
        cases = {
            window: LongWindowCase(
                window=window, size=size, dtype="bf16", direction=way, limits=_limits(math.prod(window), way)
            )
            for window, size in _SIZES.items()
        }
        video, square = cases[8, 7, 7], cases[16, 16]
        yield replace(video, tier="quick")
        yield from (case for window, case in cases.items() if window != (8, 7, 7))
        yield replace(video, dtype="fp16")
        # The region of a token is one byte.
        yield replace(video, shifted=True, limits=replace(video.limits, load_bytes=1))
        # Norms and their factors are computed for each tile.
        limits = replace(square.limits, instructions=int(1.3 * (square.limits.instructions or 0)))
        yield replace(square, cosine=True, limits=limits)
        # Exact products are bound by FFMA, and no floor is promised.
        yield replace(square, dtype="fp32", limits=replace(square.limits, instructions=None, of_exp2=None, stack=16))


def _allowed() -> Iterator[tuple[str, dict[str, float]]]:
    """On sm_80 loads and stores bind everywhere: HMMA has its factors from registers, by way of shared memory.

    There 8x7x7 is seven blocks of 64 rows, which hold 392 tokens: 14% of everything is done for rows that are not
    there. On sm_90 issue binds the backward, and the product of one-hot rows that hides other regions, with its
    factors, both of a shifted call. Of cosines, products with what rounding left over come on top.
    """
    of_exp2: dict[str, tuple[float | None, float | None]] = {
        "8x7x7 d32 bf16 forward": (1.81, None),
        "24x24 d32 bf16 forward": (1.97, None),
        "16x7x7 d32 bf16 forward": (2.12, None),
        "8x7x7 d32 fp16 forward": (1.81, None),
        "8x7x7 d32 bf16 forward shifted": (2.42, 1.47),
        "16x16 d32 bf16 forward cosine": (1.6, 1.4),
        "8x7x7 d32 bf16 backward": (3.06, 1.33),
        "16x16 d32 bf16 backward": (1.48, None),
        "24x24 d32 bf16 backward": (3.05, 1.18),
        "16x7x7 d32 bf16 backward": (3.24, 1.26),
        "8x7x7 d32 fp16 backward": (3.06, 1.33),
        "8x7x7 d32 bf16 backward shifted": (3.6, 1.88),
        "16x16 d32 bf16 backward cosine": (2.04, 1.74),
    }
    for name, parts in of_exp2.items():
        for arch, part in zip((80, 90), parts, strict=True):
            if part is not None:
                yield f"{name}, sm_{arch}", {"of_exp2": part}


ALLOWED: dict[str, dict[str, float]] = dict(_allowed())
_STACK = {
    "16x7x7 d32 bf16 forward, sm_90": 24,
    "16x16 d32 bf16 forward cosine, sm_80": 48,
    "8x7x7 d32 bf16 backward, sm_90": 128,
    "16x16 d32 bf16 backward, sm_90": 48,
    "16x16 d32 bf16 backward, sm_80": 48,
    "24x24 d32 bf16 backward, sm_90": 112,
    "16x7x7 d32 bf16 backward, sm_90": 296,
    "8x7x7 d32 fp16 backward, sm_90": 144,
    "8x7x7 d32 bf16 backward shifted, sm_90": 432,
    "8x7x7 d32 bf16 backward shifted, sm_80": 88,
    "16x16 d32 bf16 backward cosine, sm_80": 48,
}
"""Bytes that spill where all keys or queries of a window are at hand, or tiles are wide."""
for _name, _bytes in _STACK.items():
    ALLOWED.setdefault(_name, {})["stack"] = _bytes

CASES = tuple(_cases())
