"""One call of window attention, as its launchers see it: sizes, tensors, and what every kernel of the call is told.

Letters: B batch · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.rel_pos_bias import BiasForm, expand_bias
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
    full: tuple[int, int]
    num_heads: int
    wanted_shift: tuple[int, int]
    scale: float
    cyclic: tuple[bool, bool]
    precision: str

    @property
    def size(self) -> tuple[int, int]:
        return self.qkv.shape[1], self.qkv.shape[2]

    @cached_property
    def window(self) -> tuple[int, int]:
        return min(self.size[0], self.full[0]), min(self.size[1], self.full[1])

    @cached_property
    def shift(self) -> tuple[int, int]:
        return tuple(0 if s <= w else x for s, w, x in zip(self.size, self.full, self.wanted_shift, strict=True))

    @property
    def tokens(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[3] // (3 * self.num_heads)

    @cached_property
    def windows(self) -> int:
        """How many windows the whole batch has."""
        rows, columns = (triton.cdiv(s, w) for s, w in zip(self.size, self.window, strict=True))
        return self.qkv.shape[0] * rows * columns

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
        """Arguments B to scale, and the constants WH, WW and D, of every kernel."""
        return (len(self.qkv), *self.size, self.num_heads, *self.shift, self.scale, *self.window, self.head_dim)

    @property
    def rules(self) -> tuple[bool, ...]:
        """Constants CYCLIC_H, CYCLIC_W, FILL and RAGGED of every kernel."""
        return (*self.cyclic, self.fills, self.ragged)

    @property
    def has_edges(self) -> bool:
        """Constant HAS_EDGES of every kernel: whether some window holds a pad or a seam of the roll."""
        return self.ragged or any(self.shift)

    @cached_property
    def target(self) -> Target:
        return target_of(self.qkv.device)

    def expand(self, form: BiasForm) -> Tensor:
        """Write the bias in the form that a kernel reads."""
        return expand_bias(
            self.table, self.bias, self.num_heads, self.scale, self.full, self.window, form, self.qkv.device
        )

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
) -> WindowCall:
    """Put the arguments of a launcher together."""
    return WindowCall(
        qkv.contiguous(),
        table,
        bias,
        qkv_bias if pad_mode == "bias" else None,
        tuple(window_size),
        num_heads,
        tuple(shift_size),
        scale,
        tuple(cyclic),
        "tf32" if tf32 else "ieee",
    )
