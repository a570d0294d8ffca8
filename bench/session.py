"""What kind of run this is, where it runs, and what an op's file must hold; shared by the harness and the stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.machine import Clock
from bench.store import Store
from florence_fast.ops.cases import Function, Inputs
from florence_fast.verify.timing import MODES


class Missing(Exception):
    """A competitor cannot take part here; the message says why."""


class OutOfTime(Exception):
    """The run's time is over; what is stored stands."""


class DeviceLost(Exception):
    """An error has left the device unusable for the rest of this process."""


@dataclass(frozen=True)
class Plan:
    """What kind of run this is."""

    rehearse: bool = False
    full: bool = False
    """Take the competitors that need minutes to compile, too."""


@dataclass(frozen=True)
class Built:
    """A competitor that is ready to be called with the tensors."""

    function: Function
    forward_only: str | None = None
    """Why there is no backward; None if there is one."""


class OpBench(Protocol):
    """What a file in ``bench/ops`` holds; what it may hold as well, ``entry_of`` and the two below it read."""

    OP: str
    """The stage's name, and that of the op in ``florence_fast.ops.OPS`` unless there is an ``ENTRY``."""
    PLACE: int
    """Where the file stands among all, the most valuable first: a run may be cut short."""
    WHAT: str
    """What is worth knowing of the stage."""
    SHAPES: dict[str, Any]
    REHEARSAL: dict[str, Any]
    COMPETITORS: dict[str, Callable[[Inputs, Plan], Built]]
    """Name -> what builds it, or raises ``Missing``. "eager" is the plain computation that the gate compares with."""
    SLOW_TO_BUILD: tuple[str, ...]
    """The competitors that wait until all others have been measured at all shapes."""
    setup: Callable[[Any, torch.dtype, str, int], Inputs]
    bytes_moved: Callable[[Any, torch.dtype, str], int]
    flops: Callable[[Any, str], int]
    units: Callable[[Any], int]
    budget_cases: Callable[[Any, str, str], list[str]]


def entry_of(op: OpBench) -> str:
    """Return the name of the op in ``florence_fast.ops.OPS``: ``ENTRY``, where a file measures one form of an op."""
    return getattr(op, "ENTRY", op.OP)


def modes_of(op: OpBench) -> tuple[str, ...]:
    """Return what is timed: ``MODES``, for an op without a gradient."""
    return getattr(op, "MODES", MODES)


def dtypes_of(op: OpBench, shape: Any, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of ``dtypes`` a size is measured in: those that ``takes(shape, dtype)``, where there is one."""
    takes = getattr(op, "takes", None)
    return dtypes if takes is None else tuple(dtype for dtype in dtypes if takes(shape, dtype))


@dataclass
class Session:
    """One run of the benchmarks on one device."""

    device: torch.device
    facts: dict[str, Any]
    store: Store
    logs: Path
    """Where the output of child processes goes."""
    clock: Clock
    plan: Plan = field(default_factory=Plan)
    seconds: float = 0.3
    """How long each row is timed, warm-up not counted."""
    copy_rate: float = math.nan
    matrix_rate: float = math.nan
    show: Callable[[str], None] = print
    made: set[str] = field(default_factory=set)
    """Keys of the rows of this run: who was missing at its start is not asked again before the next."""

    def check_time(self) -> None:
        """Stop between two rows when the time is over."""
        if self.clock.left() <= 0:
            raise OutOfTime
