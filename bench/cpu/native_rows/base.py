"""How a subject of ``bench.cpu.native`` measures: all competitors in turns, one row a comparison.

Memory is allocated as the process finds it: glibc gives every block over 32 MB back to the system, so such results are
mapped anew, page by page, at each call of either side. Users have it so, and the figures keep it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cpu.rows.base import CPU, Skipped
from bench.machine import Clock
from bench.store import Row, Store
from florence_fast import processor
from florence_fast.timing import time_calls

WHAT_DECIDES = (
    *("csrc", "florence_fast/native.py", "florence_fast/ops", "florence_fast/models", "florence_fast/compat"),
    *("florence_fast/train/loss.py", "florence_fast/verify", "florence_fast/timing.py", "bench/cpu/native_rows"),
)

Call = Callable[[], Any]
Builds = Mapping[str, Callable[[], Call]]

OURS = "ours"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 5e-2, "fp32": 1e-3}
"""How far results may differ as a part of their norm: enough to notice that a competitor computes something else."""


@dataclass(frozen=True)
class Subject:
    """One comparison: the same work by each competitor."""

    op: str
    shape: str
    sizes: dict[str, Any]
    dtype: str
    mode: str

    @property
    def key(self) -> str:
        return "|".join((self.op, self.shape, self.dtype, self.mode))


@dataclass
class Run:
    """One run of the command: where rows go, and how long it may take."""

    facts: dict[str, Any]
    store: Store
    clock: Clock
    turns: int = 9
    """The least number of repetitions of each competitor."""
    seconds: float = 0.5
    """For how long each is repeated where that takes more turns."""
    tiny: bool = False
    """Small sizes, which prove that everything runs and measure nothing."""
    quick: bool = False
    """Without what torch.compile has to compile."""
    show: Callable[[str], None] = print
    finished: list[str] = field(default_factory=list)

    def wanted(self, subject: Subject, names: Mapping[str, Any]) -> list[str]:
        """Return the competitors of which the stored row knows neither a time nor an error; none behind the limit."""
        if self.clock.left() <= 0:
            return []
        row = self.store.rows.get(subject.key)
        if row is None or row["sources"] != self.facts["sources"]:
            return list(names)
        return [name for name in names if name not in row["times"] and name not in row["errors"]]

    def compare(self, subject: Subject, builds: Builds) -> None:
        """Time the competitors in turns and store the row.

        Args:
            builds: name -> what returns the call, or raises ``Skipped``; it may compile, which is not timed. Results
                that a call returns are compared with those of the other calls.
        """
        wanted = self.wanted(subject, builds)
        if wanted and subject.dtype == "bf16" and not self.tiny and not processor.units("bf16").fast:
            # One pass of eager PyTorch takes minutes there.
            return self.put(subject, {}, dict.fromkeys(builds, processor.units("bf16").reason), {})
        field = _Field(builds)
        field.build(wanted)
        if not (field.calls or field.errors):
            return
        # Turns are fair only if all take part, so those that have a time get a new one.
        field.build([name for name in builds if name not in wanted])
        calls, missing, errors = field.agreeing(TOLERANCE[subject.dtype]), field.missing, field.errors
        turns, seconds = (2, 0.0) if self.tiny else (self.turns, self.seconds)
        timings = time_calls({name: [call] for name, call in calls.items()}, CPU, seconds, least_turns=turns)
        self.put(subject, {name: asdict(timing) for name, timing in timings.items()}, missing, errors)

    def put(self, subject: Subject, times: dict[str, Row], missing: dict[str, str], errors: dict[str, str]) -> None:
        """Complete a row, store it and show it."""
        row = {
            "key": subject.key,
            "stage": subject.op,
            **asdict(subject),
            "status": "error" if errors else "timed",
            "times": times,
            "missing": missing,
            "errors": errors,
            **self.facts,
        }
        self.store.put(row)
        self.finished.append(subject.key)
        shown = [f"{name} {time['median'] * 1e3:.3g}" for name, time in times.items()]
        shown += [f"{name}: {reason}" for name, reason in (missing | errors).items()]
        self.show(f"  {subject.op} {subject.shape}, {subject.dtype}, {subject.mode}, ms: {' · '.join(shown)}")


class _Field:
    """The competitors of one comparison while they are built."""

    def __init__(self, builds: Builds) -> None:
        self.builds = builds
        self.calls: dict[str, Call] = {}
        self.results: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def build(self, names: list[str]) -> None:
        """Build some of them, and call each once; why one cannot take part is noted."""
        for name in names:
            try:
                call = self.builds[name]()
                self.results[name] = call()
                self.calls[name] = call
            except Skipped as reason:
                self.missing[name] = str(reason)
            except Exception as error:
                self.errors[name] = f"{type(error).__name__}: {error}"[:300]

    def agreeing(self, tolerance: float) -> dict[str, Call]:
        """Return the calls in their order, without those whose results are not those of the others."""
        order = [name for name in self.builds if name in self.calls]
        self.errors |= disagreements({name: self.results[name] for name in order}, tolerance)
        self.results.clear()
        return {name: self.calls[name] for name in order if name not in self.errors}


def disagreements(results: Mapping[str, Any], tolerance: float) -> dict[str, str]:
    """Say of which competitors the results are not those of the last that returned any: the plainest stands last."""
    tensors = {name: _tensors(result) for name, result in results.items() if result is not None}
    if not tensors:
        return {}
    *names, plainest = tensors
    found = {}
    for name in names:
        worst = max(_distance(a, b) for a, b in zip(tensors[name], tensors[plainest], strict=True))
        if not worst <= tolerance:
            found[name] = f"differs from {plainest} by {worst:.1e} of its norm, more than {tolerance:.0e}"
    return found


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
