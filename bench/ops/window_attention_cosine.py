"""Swin V2's attention, which multiplies cosines, at the sizes of the one public kernel for it.

flash-window-attention-v2 publishes its speed on 16 maps of 16 windows with 6 heads of 32. It takes windows that are cut
out; here it starts from the map as all others do, and what stands around it is timed too.
"""

from bench.competitors import SLOW as SLOW_TO_BUILD
from bench.competitors import Build, field, library
from bench.competitors_windows import flash_window_attention_v2
from bench.ops import window_attention
from bench.ops.window_attention import bytes_moved, flops, units
from florence_fast.ops.window_attention.cases import Shape, cosine_eager, cosine_sdpa, rival
from florence_fast.ops.window_attention.cases import setup_cosine as setup

__all__ = [
    "COMPETITORS",
    "ENTRY",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "units",
]

OP, ENTRY = "window_attention_cosine", "window_attention"
PLACE = 8
WHAT = "Swin V2's attention at the sizes of flash-window-attention-v2's figure"
SHAPES = {
    f"16_maps_window{side}": Shape(16, 4 * side, 4 * side, 6, window=side, shift=side // 2) for side in (8, 12, 16, 24)
}
SHAPES["16_maps_window16_unshifted"] = Shape(16, 64, 64, 6, window=16, shift=0)
REHEARSAL = {"tiny": Shape(1, 4, 7, 1, window=4, shift=2, head_dim=16)}


def budget_cases(shape: Shape, dtype: str, mode: str) -> list[str]:
    """Return the names in the static budget whose clocks add up to ``mode``; it has none that are shifted too."""
    cases = window_attention.budget_cases(shape, dtype, mode)
    return [f"{case.removesuffix(' shifted')} cosine" + " shifted" * case.endswith(" shifted") for case in cases]


MORE: dict[str, Build] = {
    "sdpa + mask": library(rival(cosine_sdpa)),
    "flash-window-attention-v2": flash_window_attention_v2,
}
COMPETITORS = field(ENTRY, rival(cosine_eager), MORE)
