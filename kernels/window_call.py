"""One call of window attention, as its launchers see it: sizes, tensors, and what every kernel of the call is told.

Sizes have three axes, (T, H, W): a map in 2-D has T = 1. And windows of T = 1 are windows in 2-D on B T maps.

Letters: B batch · T frames · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.rel_pos_bias import BiasForm, expand_bias, three_axes
from florence_fast.kernels.targets import Target, target_of


@dataclass(frozen=True)
class WindowCall:
    """The arguments of ``window_attention_fwd``, and what follows from them.

    ``window`` is ``full``, the window that was asked for, but no longer than the map; an axis no longer than the
    window is one window and is not shifted.
    """

    qkv: Tensor
    table: Tensor | None
    bias: Tensor | None
    qkv_bias: Tensor | None
    logit_scale: Tensor | None
    full: tuple[int, int, int]
    num_heads: int
    wanted_shift: tuple[int, int, int]
    scale: float
    cyclic: tuple[bool, bool, bool]
    precision: str

    @property
    def size(self) -> tuple[int, int, int]:
        return three_axes(self.qkv.shape[1:-1], 1)

    @cached_property
    def window(self) -> tuple[int, int, int]:
        return tuple(map(min, self.size, self.full))

    @cached_property
    def shift(self) -> tuple[int, int, int]:
        return tuple(0 if s <= w else x for s, w, x in zip(self.size, self.full, self.wanted_shift, strict=True))

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.window)

    @property
    def is_long(self) -> bool:
        """Whether it takes the kernels that hold a window in parts.

        The others are for up to 144 tokens in 2-D whose keys and values fit into shared memory beside each other.
        """
        large = self.tokens > 64 and self.head_dim == 128 and self.qkv.dtype == torch.float32
        # At 64 channels the compiler of Triton 3.6 gives up on the other backward for sm_80: 10 KB of stack.
        large |= self.tokens > 64 and self.head_dim == 64 and self.target.arch < 90
        return large or self.window[0] > 1 or self.tokens > 144 or self.logit_scale is not None

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[-1] // (3 * self.num_heads)

    @cached_property
    def windows_per_map(self) -> int:
        """M."""
        return math.prod(map(triton.cdiv, self.size, self.window))

    @property
    def windows(self) -> int:
        """How many windows the whole batch has."""
        return len(self.qkv) * self.windows_per_map

    @cached_property
    def ragged(self) -> bool:
        """Whether the windows do not divide the map."""
        return any(s % w for s, w in zip(self.size, self.window, strict=True))

    @property
    def fills(self) -> bool:
        """Whether there are pads, and they hold ``qkv_bias`` and take part as keys."""
        return self.qkv_bias is not None and self.ragged

    @property
    def fill(self) -> Tensor:
        """What to point at for pads; without any it is not read."""
        return self.qkv_bias.contiguous() if self.fills else self.qkv

    @property
    def sizes(self) -> tuple[int | float, ...]:
        """Arguments B to scale, and the constants WH, WW and D, of every kernel for windows in 2-D."""
        (frames, *size), shift, window = self.size, self.shift[1:], self.window[1:]
        return (len(self.qkv) * frames, *size, self.num_heads, *shift, self.scale, *window, self.head_dim)

    @property
    def rules(self) -> tuple[bool, ...]:
        """Constants CYCLIC_H, CYCLIC_W, FILL and RAGGED of every kernel for windows in 2-D."""
        return (*self.cyclic[1:], self.fills, self.ragged)

    @property
    def has_edges(self) -> bool:
        """Constant HAS_EDGES of every kernel: whether some window holds a pad or a seam of the roll."""
        return self.ragged or any(self.shift)

    @cached_property
    def target(self) -> Target:
        return target_of(self.qkv.device)

    def expand(self, form: BiasForm) -> Tensor:
        """Write the bias in the form that a kernel reads."""
        scale = self.scale if self.logit_scale is None else 1.0
        return expand_bias(self.table, self.bias, self.num_heads, scale, self.full, self.window, form, self.qkv.device)

    def config(self, kernel: str, bucket: int, default: Config) -> Config:
        """Return how ``kernel`` is launched; ``bucket`` is N, rounded to what is compiled."""
        return config_of(kernel, self.target.arch, self.qkv.dtype, bucket, self.head_dim, default)

    def runs(self, config: Config, programs_per_run: int) -> int:
        """Into how many runs the windows are cut, so that all programs are on the GPU at once."""
        at_once = config.programs_per_sm * self.target.num_sms
        return max(1, min(self.windows, at_once // programs_per_run))

    def partial(self, *shape: int) -> Tensor:
        """Make room for sums that the programs leave to be added."""
        return self.qkv.new_empty(shape, dtype=torch.float32)


def window_call(
    qkv: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    scale: float,
    pad_mode: str,
    cyclic: Sequence[bool],
    tf32: bool,
    logit_scale: Tensor | None = None,
) -> WindowCall:
    """Put the arguments of a launcher together."""
    return WindowCall(
        qkv.contiguous(),
        table,
        bias,
        qkv_bias if pad_mode == "bias" else None,
        None if logit_scale is None else logit_scale.contiguous(),
        three_axes(window_size, 1),
        num_heads,
        three_axes(shift_size, 0),
        scale,
        three_axes(cyclic, False),
        "tf32" if tf32 else "ieee",
    )
