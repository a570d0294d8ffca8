"""What each case of the static budget has: one call of an op, what is counted in it, and the limits that it must keep.

Everything is counted for one *unit* of the op: a window and head, a tile of logits, a row. Bytes, FLOPs and
exponentials come from formulas, clocks from the machine code; ``weight`` says how the loops found there make a unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Limits:
    """What the compiled code of a case must keep; None where the case has no such rule."""

    instructions: int | None = None
    """Of a warp for an inner window."""
    stack: int | None = 0
    """Bytes of a thread, at most."""
    of_memory: float | None = 1.0
    """What the busiest unit may need, as a part of the clocks that memory takes."""
    of_exp2: float | None = None
    """The same, as a part of the clocks of the exponentials, or of memory where it takes longer."""
    tensor_share: float | None = None
    """What the tensor cores need, at least, as a part of the clocks of what binds, be it a unit or memory."""
    split_rows: int | None = 0
    """Tiles of so few rows may have the keys of a row over several warps."""
    wide_share: float = 1.0
    """How much of what a unit loads from global memory comes in loads of 16 bytes, by bytes."""
    load_bytes: int = 4
    """How many bytes a thread every load from global memory has, at least."""
    store_bytes: int = 4
    """How many bytes a thread every store to global memory has, at least."""
    calls: int = 0
    """Calls of subroutines in a unit's loop, at most: nothing counts what those do."""
    padding: float = 2.5
    """How many times the work of the formula the code may do, because tiles stand out over what there is."""


@dataclass(frozen=True)
class Weight:
    """How the loops of one compiled kernel add up to one unit; a loop counts that does the case's work.

    One trip of an outermost loop is a step; with ``body`` the step is the whole program instead, once through what no
    loop holds, and through one of two outermost loops where edge units have their own. In a step, loops that hold no
    other run ``inner`` times, those around them ``outer`` times, and loops that do other work once.
    """

    inner: float = 1
    outer: float = 1
    times: float = 1
    """Steps that make one unit."""
    body: bool = False
    early: int = 0
    """Trips of an innermost loop whose asynchronous copies stand before it: the last trips copy nothing."""
    parts: tuple[float, ...] = ()
    """Where a unit takes steps of several outermost loops: how many of each, the loop with the largest step first.

    If there are edge units such a loop holds them too, as the other side of a branch: a step is half of both.
    """


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of an op. The class of an op gives the names without a value here."""

    op: ClassVar[str]
    unit: ClassVar[str]
    """In one word, as in "clocks a window"."""
    loops: ClassVar[int] = 1
    """Outermost loops that each do a unit: 2 where some units need more than others, and have a loop of their own."""
    edge_share: ClassVar[float] = 0.0
    """How many of the units are those of the second loop."""

    dtype: str
    """bf16, fp16, fp32 or tf32, which is fp32 whose products may round their factors."""
    direction: str
    limits: Limits = Limits()
    tier: str = "full"
    archs: tuple[int, ...] = (80, 90)

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique; bench.budget.predicted and bench/ops find the case by it."""

    @property
    @abstractmethod
    def kernels(self) -> tuple[str, ...]:
        """Kernels of the hot path, one for each launch of other code; the others of the call are not compiled."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What a unit moves between the GPU's memory and its multiprocessors."""

    @property
    def accesses(self) -> int:
        """What a unit loads from global memory and stores there, out of the caches too."""
        return self.bytes

    @property
    def flops(self) -> int:
        """What the products of a unit need; 0 for an op that only moves memory."""
        return 0

    @property
    def exp2(self) -> int:
        """Exponentials of a unit."""
        return 0

    @property
    def measured_as(self) -> str:
        """The file of bench/ops that measures such calls, where there is one."""
        return self.op

    @property
    def sizes(self) -> dict[str, Any] | None:
        """Sizes in that file of a call that is this case's, so far as they matter; None if nothing measures it.

        As JSON has them: a window in 3-D is a list.
        """
        return None

    @abstractmethod
    def weight(self, kernel: dict[str, Any]) -> Weight | None:
        """Return how the loops of one kernel, in JSON of ``bench.budget.aot``, make a unit; None for a form not hot.

        Of a form that is not hot the budget wants to know its stack and nothing else.
        """

    @abstractmethod
    def launch(self, empty: Callable[..., Any]) -> None:
        """Call the op's launcher on tensors of ``empty(*sizes, dtype=...)``; without a dtype they have the case's."""
