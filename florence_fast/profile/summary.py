"""Summarise a profile as rows: our ranges, torch's ops and, on a GPU, the kernels, in milliseconds a step.

On a CPU a range's time is the time that passed in it; on a GPU it is the time of the kernels that were launched in it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from florence_fast.ranges import PREFIX

Rows = list[dict[str, Any]]
STEP = f"{PREFIX}step"


def summarise(profiler: torch.profiler.profile, steps: int, *, device: bool) -> dict[str, Any]:
    """Return the tables of a profile that is over.

    Args:
        profiler: what watched ``steps`` steps, each inside a range named `STEP`.
        steps: how many there were; times and calls are divided by it.
        device: count the time of kernels, not the time that passes on the CPU.

    Returns:
        "steps", "time" ("kernels" or "cpu"), "whole_ms" (all kernels, or the step itself), and rows:
        "ranges" with "name", "calls", "total_ms", "self_ms" (without the ranges inside) and "share", which is
        "total_ms" over the whole; "ops" with the same, "self_ms" being without the ops inside; "kernels" with "name",
        "calls", "total_ms" and "share", empty on a CPU.
    """
    events = list(profiler.events() or ())
    kernels = [event for event in events if _is_kernel(event)]
    if device:
        whole = sum(_elapsed(event) for event in kernels)
    else:
        whole = sum(_elapsed(event) for event in events if event.name == STEP)
    scale = 1e-3 / steps  # microseconds of all steps -> milliseconds of one
    return {
        "steps": steps,
        "time": "kernels" if device else "cpu",
        "whole_ms": whole * scale,
        "ranges": range_rows(events, whole, steps, device=device),
        "ops": op_rows(profiler.key_averages(), whole, steps, device=device),
        "kernels": kernel_rows(kernels, whole, steps),
    }


def range_rows(events: Iterable[Any], whole: float, steps: int, *, device: bool) -> Rows:
    """Add up the ranges of each name, the longest first; microseconds come in, milliseconds a step go out."""
    spent_in = _kernel_time() if device else _elapsed
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    inner: dict[str, float] = defaultdict(float)
    for event in events:
        if not _is_range(event):
            continue
        spent = spent_in(event)
        calls[event.name] += 1
        total[event.name] += spent
        if (outer := _enclosing_range(event)) is not None:
            inner[outer.name] += spent
    rows = [_row(name, calls[name], total[name], total[name] - inner[name], whole, steps) for name in calls]
    return sorted(rows, key=lambda row: -row["total_ms"])


def op_rows(averages: Iterable[Any], whole: float, steps: int, *, device: bool) -> Rows:
    """Take torch's ops, those with the most time of their own first; our ranges are not among them."""
    kind = "device" if device else "cpu"
    rows = []
    for average in averages:
        if average.device_type != DeviceType.CPU or average.is_user_annotation or average.key.startswith(PREFIX):
            continue
        own, total = getattr(average, f"self_{kind}_time_total"), getattr(average, f"{kind}_time_total")
        rows.append(_row(average.key, average.count, total, own, whole, steps))
    return sorted((row for row in rows if row["self_ms"] > 0), key=lambda row: -row["self_ms"])


def kernel_rows(kernels: Iterable[Any], whole: float, steps: int) -> Rows:
    """Add up the kernels of each name, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(_elapsed(kernel))
    rows = [_row(name, len(each), sum(each), sum(each), whole, steps) for name, each in times.items()]
    return sorted(rows, key=lambda row: -row["total_ms"])


def _row(name: str, calls: int, total: float, own: float, whole: float, steps: int) -> dict[str, Any]:
    scale = 1e-3 / steps
    return {
        "name": name,
        "calls": calls / steps,
        "total_ms": total * scale,
        "self_ms": own * scale,
        "share": total / whole if whole else 0.0,
    }


def _is_range(event: Any) -> bool:
    """A range as the thread that opened it saw it; the profiler mirrors it on the GPU's time line too."""
    return event.device_type == DeviceType.CPU and event.name.startswith(PREFIX)


def _is_kernel(event: Any) -> bool:
    """Something that the GPU did, copies too."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation and not event.name.startswith(PREFIX)


def _elapsed(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def _kernel_time() -> Callable[[Any], float]:
    """Return a function that gives the time of the kernels launched inside an event, each event being summed once."""
    known: dict[int, float] = {}

    def spent(event: Any) -> float:
        if id(event) not in known:
            own = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
            known[id(event)] = own + sum(map(spent, event.cpu_children))
        return known[id(event)]

    return spent


def _enclosing_range(event: Any) -> Any | None:
    """Return the innermost range around ``event`` in its thread."""
    outer = event.cpu_parent
    while outer is not None and not _is_range(outer):
        outer = outer.cpu_parent
    return outer
