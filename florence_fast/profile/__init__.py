"""Profile a model's steps with torch.profiler: time by range, op and kernel."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from florence_fast import ranges
from florence_fast.files import replacing
from florence_fast.profile.summary import summarise
from florence_fast.profile.workload import Step, Workload, make_step
from florence_fast.provenance import provenance

__all__ = ["Workload", "make_step", "profile", "run_bare", "summarise"]

Show = Callable[[str], None]


def profile(
    workload: Workload,
    device: str,
    *,
    steps: int = 5,
    warmup: int = 2,
    trace: Path | None = None,
    show: Show = lambda line: None,
) -> dict[str, Any]:
    """Run warm steps without a profiler, then as many under it, with ranges on.

    Args:
        workload: what a step does.
        device: "cpu" or "cuda", with an index if wanted.
        steps: how many steps are measured, each way.
        warmup: steps before that count for nothing: kernels are compiled, memory is taken.
        trace: where a Chrome trace is written, which chrome://tracing and Perfetto open.
        show: is told what goes on.

    Returns:
        What `summarise` returns, with the workload, the median step in milliseconds with and without the profiler,
        and what made the figures.

    Raises:
        ValueError: the workload cannot be run as it was asked for.
    """
    show("building the model")
    step, place = make_step(workload, device), torch.device(device)
    show(f"{warmup} steps to warm up, {steps} without the profiler")
    _timed(step, place, warmup)
    plain = _timed(step, place, steps)
    show(f"{steps} steps under the profiler")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (place.type == "cuda")
    with ranges.enabled():
        # The first step with ranges on may compile what was compiled without them.
        _timed(step, place, 1)
        with torch.profiler.profile(activities=activities) as profiler:
            watched = _timed(step, place, steps)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        with replacing(trace) as beside:
            profiler.export_chrome_trace(str(beside))
    return {
        "workload": asdict(workload),
        "device_type": place.type,
        "step_ms": {"without_profiler": _median_ms(plain), "under_profiler": _median_ms(watched)},
        **summarise(profiler, steps, device=place.type == "cuda"),
        **provenance(),
    }


def run_bare(workload: Workload, device: str, *, steps: int, warmup: int) -> float:
    """Run the steps with NVTX ranges for a profiler around this process, and return their median in milliseconds.

    On CUDA the measured steps stand between cudaProfilerStart and cudaProfilerStop, so that the profiler can leave
    out the warm-up.
    """
    step, place = make_step(workload, device), torch.device(device)
    with ranges.enabled(nvtx=True):
        _timed(step, place, warmup)
        with torch.cuda.profiler.profile() if place.type == "cuda" else nullcontext():
            return _median_ms(_timed(step, place, steps))


def _timed(step: Step, device: torch.device, count: int) -> list[float]:
    """Seconds of each of ``count`` steps, to the end of its last kernel."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        with ranges.annotate("step"):
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
