"""Cases of attention in windows that are cut out already, as a Swin model calls it; the unit is one window and head.

q, k and v lie in one tensor (B*M, N, 3, h, d), bias and mask are given. Of a call's kernels those that expand bias and
mask run once whatever the batch is, and are left out.

Letters: B maps · M windows of one map · N tokens in one window · h heads · d head dim · s bytes of an element.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from bench.budget.ops.base import ITEMSIZE, Case, Limits, Weight


@dataclass(frozen=True)
class PartitionedCase(Case):
    """One call on ``maps`` maps of ``masks`` windows each."""

    op: ClassVar[str] = "window_attention_partitioned"
    unit: ClassVar[str] = "window"

    tokens: int
    head_dim: int
    heads: int
    maps: int
    masks: int = 64

    @property
    def name(self) -> str:
        return f"partitioned N{self.tokens} d{self.head_dim} {self.dtype} {self.direction}"

    @property
    def one_tile(self) -> bool:
        return self.tokens <= 64

    @property
    def kernels(self) -> tuple[str, ...]:
        if self.direction == "forward":
            return ("_window_attention_partitioned_fwd_kernel",)
        return ("_window_attention_partitioned_bwd_kernel",) * (1 if self.one_tile else 3)

    # Forward: q, k, v in and the result out, 4 N d, and a float32 statistic a row. Backward of one tile: q, k, v, the
    # gradient and the statistic in, three gradients out. Of more: the launch for dq has 5 N d and writes a second
    # statistic, that for dk and dv 6 N d, that for bias and mask 4 N d. Bias and mask come out of the caches.
    @property
    def bytes(self) -> int:
        streams, statistics = (4, 1) if self.direction == "forward" else (7, 1) if self.one_tile else (15, 6)
        return self.tokens * (streams * self.head_dim * ITEMSIZE[self.dtype] + statistics * 4)

    # q k^T and p v, 2 N^2 d each. Backward of one tile: q k^T anew, dp, dv, dq and dk. Of more: each launch computes
    # q k^T and dp; the first also p k and p dp k, the second dv and dk.
    @property
    def flops(self) -> int:
        products = 2 if self.direction == "forward" else 5 if self.one_tile else 10
        return products * 2 * self.tokens**2 * self.head_dim

    # One a score, each time that the scores are computed.
    @property
    def exp2(self) -> int:
        return self.tokens**2 * (1 if self.direction == "forward" or self.one_tile else 3)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "head_dim": self.head_dim, "heads": self.heads, "masks": self.masks}

    def weight(self, kernel: dict[str, Any]) -> Weight:
        blocks, width, columns = (int(kernel["constexprs"][name]) for name in ("BLOCKS", "WIDTH", "COLUMNS"))
        across = columns // width
        programs = blocks * (across if kernel["constexprs"].get("FORM") == "tile" else 1)
        # A step is the part of a run that has one mask: each run begins one, and so does each mask but the first.
        steps = kernel["grid"][0] / (self.heads * programs) + self.masks - 1
        windows = max(1.0, self.maps * self.masks / steps)
        if programs > blocks or across == 1:
            return Weight(inner=windows, times=programs / windows)
        return Weight(inner=across, outer=windows, times=programs / windows)

    def launch(self, empty: Callable[..., Any]) -> None:
        import torch

        from florence_fast.kernels import window_attention_partitioned as kernels

        windows, square = self.maps * self.masks, (self.tokens, self.tokens)
        qkv = empty(windows, self.tokens, 3, self.heads, self.head_dim)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        bias, mask = empty(self.heads, *square, dtype=torch.float32), empty(self.masks, *square)
        values = (self.head_dim**-0.5,)
        if self.direction == "forward":
            kernels.window_attention_partitioned_fwd(q, k, v, bias, mask, *values, True)
            return
        shape = (windows, self.heads, self.tokens)
        out, lse = empty(*shape, self.head_dim), empty(*shape, dtype=torch.float32)
        needs = [True, True, True, True, False]
        kernels.window_attention_partitioned_bwd(out, q, k, v, bias, mask, lse, needs, *values)


def _cases() -> Iterator[PartitionedCase]:
    """First stages of images of 224 and 384 pixels."""
    for (tokens, heads, maps), way in itertools.product(((49, 3, 128), (144, 4, 32)), ("forward", "backward")):
        # The backward loads statistics by 4 bytes, which Triton 3.6 does for each thread that needs them, and what is
        # added to a tile of many by 8.
        limits = Limits() if way == "forward" else Limits(stack=63, wide_share=0.65 if tokens == 49 else 0.6)
        sizes = {"tokens": tokens, "head_dim": 32, "heads": heads, "maps": maps}
        tier = "quick" if tokens == 49 and way == "forward" else "full"
        yield PartitionedCase(dtype="bf16", direction=way, limits=limits, tier=tier, **sizes)


ALLOWED: dict[str, dict[str, float]] = {
    # 144 tokens lie in 192 rows of 160, and bias and mask are read for each tile.
    "partitioned N144 d32 bf16 forward": {"of_memory": 2.55},
    "partitioned N144 d32 bf16 backward": {"of_memory": 2.15},
}

CASES = tuple(_cases())
