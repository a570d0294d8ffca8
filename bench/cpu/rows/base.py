"""How a subject of ``bench.cpu`` measures: competitors in turns, peak memory in a child process, rows as of a GPU."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, Clock
from bench.store import Row, Store
from florence_fast import native
from florence_fast.timing import time_calls

CPU = torch.device("cpu")
OURS = "ours (cpp)" if native.extension() else "ours (torch)"
"""Our ops by the backend that they take on a processor."""
EMPTY = ("reason", "errors", "median", "q20", "q80", "samples", "repeats", "peak_bytes", "bytes_moved", "flops")


Builds = Mapping[str, Callable[[], Callable[[], Any]]]


class Skipped(Exception):
    """A competitor cannot take part here; the message says why."""


@dataclass
class Subject:
    """One comparison: the same work by each competitor."""

    op: str
    shape: str
    sizes: dict[str, Any]
    dtype: str
    mode: str

    def key(self, competitor: str) -> str:
        return "|".join((self.op, self.shape, self.dtype, self.mode, competitor))


@dataclass
class Run:
    """One run of the command: where rows go, and how long it may take."""

    facts: dict[str, Any]
    store: Store
    clock: Clock
    seconds: float = 5.0
    """How long each competitor is timed."""
    tiny: bool = False
    """Small sizes, which prove that everything runs and measure nothing."""
    show: Callable[[str], None] = print
    finished: list[str] = field(default_factory=list)

    def compare(self, subject: Subject, builds: Builds) -> None:
        """Time the competitors in turns and store a row of each.

        Args:
            builds: name -> what returns the call, or raises ``Skipped``; it may compile, which is not timed. Any other
                error becomes the row.
        """
        pending = [name for name in builds if not self.store.finished(subject.key(name))]
        if self.clock.left() <= 0:
            return
        calls = self._calls(subject, builds, pending)
        if not calls:
            return
        # Turns are fair only if all take part, so those that have a row get a new one.
        calls |= self._calls(subject, builds, [name for name in builds if name not in pending])
        for name, timing in time_calls(calls, CPU, 0.0 if self.tiny else self.seconds).items():
            self.put(subject, name, {"status": "timed", **asdict(timing)})

    def _calls(self, subject: Subject, builds: Builds, names: list[str]) -> dict[str, list[Callable[[], Any]]]:
        """Build some competitors; why one cannot take part becomes its row."""
        calls = {}
        for name in names:
            try:
                calls[name] = [builds[name]()]
            except Skipped as reason:
                self.put(subject, name, {"status": "missing", "reason": str(reason)})
            except Exception as error:
                self.put(subject, name, {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]})
        return calls

    def peak(self, subject: Subject, competitor: str, module: str, *words: str) -> None:
        """Store the peak memory and the time of one call that a child process makes.

        Args:
            module: run as ``python -m module words...``; it prints ``{"seconds": ..., "peak_bytes": ...}`` last.
        """
        if self.store.finished(subject.key(competitor)) or self.clock.left() <= 0:
            return
        done = subprocess.run(
            [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            self.put(subject, competitor, {"status": "error", "reason": reason})
            return
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = dict.fromkeys(("median", "q20", "q80"), found["seconds"])
        outcome = {"status": "timed", **seconds, "samples": 1, "repeats": 1, "peak_bytes": found["peak_bytes"]}
        self.put(subject, competitor, outcome)

    def put(self, subject: Subject, competitor: str, outcome: Row) -> None:
        """Complete a row, store it and show it."""
        row = {
            "key": subject.key(competitor),
            "stage": subject.op,
            **asdict(subject),
            "competitor": competitor,
            **dict.fromkeys(EMPTY),
            **outcome,
            **self.facts,
        }
        self.store.put(row)
        self.finished.append(row["key"])
        named = f"{subject.op} {subject.shape} {subject.dtype} {subject.mode}"
        self.show(f"  {named:58} {competitor:22} {shown(row)}")


def shown(row: Row) -> str:
    """Say in half a line what a row holds."""
    if row["status"] != "timed":
        return f"{row['status']}: {row['reason']}"
    text = "{:10.1f} ms".format(row["median"] * 1e3)
    if row["samples"] > 1:
        text += " ({:.1f}-{:.1f})".format(row["q20"] * 1e3, row["q80"] * 1e3)
    return text if row["peak_bytes"] is None else f"{text}, {row['peak_bytes'] / 1e9:.2f} GB over the inputs"


def peak_of(call: Callable[[], Any]) -> dict[str, float]:
    """Run ``call`` and return its seconds, and how far the process's resident memory rose above where it stood.

    Linux alone counts this: the high water mark is reset by writing 5 to clear_refs.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "peak_bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Return an entry of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must hold {name}")
