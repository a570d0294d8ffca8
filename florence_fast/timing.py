"""Time calls, with events on a GPU and in turns on a CPU: the median with the 20% and 80% quantiles."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_SAMPLE_SECONDS = 100e-6
"""A sample on a GPU lasts at least as long; shorter calls are repeated inside it."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    q20: float
    q80: float
    samples: int
    repeats: int


def time_calls(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, least_turns: int = 2
) -> dict[str, Timing]:
    """Time each entry of ``calls`` for about ``seconds``.

    Args:
        calls: name -> the same call on different memory; one after the other is run, so that no call finds its
            inputs in a cache that the one before has filled.
        device: where they run.
        seconds: how long each is timed, warm-up not counted.
        least_turns: on a CPU each runs so many times at least, however long that takes.
    """
    if device.type == "cuda":
        return {name: _time_cuda(copies, seconds) for name, copies in calls.items()}
    return _time_in_turns(calls, seconds, least_turns)


def _time_cuda(copies: Sequence[Call], seconds: float) -> Timing:
    for copy in copies:
        copy()
    estimate = _elapsed(copies, 0, max(3, len(copies)))
    repeats = max(1, math.ceil(MIN_SAMPLE_SECONDS / estimate))
    samples = min(200, max(10 if estimate < 1 else 3, round(seconds / (estimate * repeats))))
    turn, pairs = 0, []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            copies[turn % len(copies)]()
            turn += 1
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return _summary([start.elapsed_time(end) / 1e3 / repeats for start, end in pairs], repeats)


def _elapsed(copies: Sequence[Call], turn: int, count: int) -> float:
    """Seconds of one call, from ``count`` of them between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(count):
        copies[(turn + i) % len(copies)]()
    end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) / 1e3 / count, 1e-7)


def _time_in_turns(calls: Mapping[str, Sequence[Call]], seconds: float, least: int) -> dict[str, Timing]:
    """Whatever else the machine does meets all competitors alike: each turn runs every call once."""
    for copies in calls.values():
        copies[0]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    turn = 0
    while turn < least or (time.perf_counter() < end and turn < 200):
        for name, copies in calls.items():
            start = time.perf_counter()
            copies[turn % len(copies)]()
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: _summary(values, 1) for name, values in times.items()}


def _summary(values: list[float], repeats: int) -> Timing:
    q20, *_, q80 = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), q20, q80, len(values), repeats)
