"""Which of our goals the stored rows meet, and how short the others are: ``python -m bench.report.goals``."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.anchors import GPU, Anchors, Goal, load_anchors
from bench.report.rows import Device, fastest, groups, is_ours, read_devices, roofline
from bench.store import Row

RESULTS = Path(__file__).parents[1] / "results"
MET, SHORT, NOT_MEASURED = "met", "short", "not measured yet"


@dataclass(frozen=True)
class Verdict:
    """What the rows of one device say about one goal."""

    goal: Goal
    status: str = NOT_MEASURED
    device: str | None = None
    value: float | None = None
    reached: float | None = None
    """How much of the goal that is: 1 or more where it is met."""
    row: str | None = None
    """The shape and dtype that decided."""
    rows: int = 0
    failed: tuple[str, ...] = ()
    """Our rows that have no time because of an error or of wrong values: a goal with one of them is not met."""


def judge_all(devices: list[Device], anchors: Anchors) -> list[Verdict]:
    """Hold every goal against every device that has rows for it; a goal without any is not measured yet."""
    verdicts = []
    for goal in anchors.goals:
        found = [judge(goal, device, anchors) for device in devices]
        verdicts += [verdict for verdict in found if verdict.status != NOT_MEASURED] or [Verdict(goal)]
    return verdicts


def judge(goal: Goal, device: Device, anchors: Anchors) -> Verdict:
    """Hold one goal against the rows of one device."""
    if not _is_for(goal, device):
        return Verdict(goal)
    values: list[tuple[float, float, str]] = []
    failed = []
    for (op, shape, dtype, mode), rows in groups(device.rows):
        if op != goal.op or mode != goal.mode or goal.dtype not in (None, dtype):
            continue
        ours = [row for row in rows.values() if is_ours(row) and row["competitor"].startswith(goal.ours)]
        ours = [row for row in ours if matches(goal.where, row["sizes"])]
        best = fastest(row for row in ours if row["status"] == "timed")
        if best is None:
            failed += [f"{shape} {dtype}: {row['status']}" for row in ours if row["status"] in ("wrong", "error")]
        value = None if best is None else METRICS[goal.metric](best, rows, goal, anchors)
        if value is not None:
            values.append((goal.reached(value), value, f"{shape} {dtype}"))
    if goal.of == "best":
        failed = []
    if not values:
        return Verdict(goal, SHORT, device.name, failed=tuple(failed)) if failed else Verdict(goal)
    reached, value, row = (max if goal.of == "best" else min)(values)
    met = reached >= 1 and not failed
    return Verdict(goal, MET if met else SHORT, device.name, value, reached, row, len(values), tuple(failed))


def _is_for(goal: Goal, device: Device) -> bool:
    if goal.device == GPU:
        return device.is_gpu
    return goal.device is None or goal.device in device.name


def matches(where: dict[str, Any], sizes: dict[str, Any]) -> bool:
    """Whether a row's sizes are those of a goal; a window of [7, 7] is one of 7."""
    for name, wanted in where.items():
        got = sizes.get(name)
        if isinstance(got, list) and len(set(got)) == 1:
            got = got[0]
        if got not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


Metric = Callable[[Row, dict[str, Row], Goal, Anchors], float | None]


def _speedup(row: Row, rows: dict[str, Row], goal: Goal, anchors: Anchors) -> float | None:
    others = [other for other in rows.values() if other["status"] == "timed" and not is_ours(other)]
    if goal.against != "best":
        others = [other for other in others if other["competitor"].startswith(goal.against)]
    best = fastest(others)
    return None if best is None else best["median"] / row["median"]


def _memory(row: Row, rows: dict[str, Row], goal: Goal, anchors: Anchors) -> float | None:
    batch, dim = row["sizes"].get("batch"), row["sizes"].get("dim")
    if not (row.get("peak_bytes") and batch and dim):
        return None
    return row["peak_bytes"] / (goal.bytes_per_value * batch * dim + goal.plus_bytes)


def _mfu(row: Row, rows: dict[str, Row], goal: Goal, anchors: Anchors) -> float | None:
    peak = anchors.peak(row["device"])
    return None if peak is None or not row.get("flops") else row["flops"] / row["median"] / peak


METRICS: dict[str, Metric] = {
    "copy_ratio": lambda row, rows, goal, anchors: row.get("copy_ratio"),
    "roofline": lambda row, rows, goal, anchors: roofline(row),
    "mfu": _mfu,
    "speedup": _speedup,
    "milliseconds": lambda row, rows, goal, anchors: row["median"] * 1e3,
    "seconds": lambda row, rows, goal, anchors: row["median"],
    "memory": _memory,
    "batch": lambda row, rows, goal, anchors: row["sizes"].get("batch"),
}


def amount(metric: str, value: float) -> str:
    """Write a value of a metric with its unit.

    >>> amount("copy_ratio", 0.853), amount("speedup", 2.5), amount("batch", 65536)
    ('85.3%', '2.50x', '65,536')
    """
    if metric in ("copy_ratio", "roofline", "mfu", "memory"):
        return f"{value:.1%}"
    return {"speedup": "{:.2f}x", "milliseconds": "{:.1f} ms", "seconds": "{:.1f} s", "batch": "{:,.0f}"}[
        metric
    ].format(value)


def wanted(goal: Goal) -> str:
    """Write what a goal asks for."""
    return f"{'at least' if goal.at_least is not None else 'at most'} {amount(goal.metric, goal.threshold)}"


def outcome(verdict: Verdict) -> str:
    """Say in half a line how a goal stands."""
    failures = f"{_rows(len(verdict.failed))} of ours without a time ({verdict.failed[0]})" if verdict.failed else ""
    if verdict.value is None:
        return f"{verdict.status}: {failures}" if failures else verdict.status
    of = f"{verdict.goal.of} of {_rows(verdict.rows)}, {verdict.row}"
    text = f"{verdict.status}: {amount(verdict.goal.metric, verdict.value)} ({of})"
    if verdict.reached < 1:
        text += f", {verdict.reached:.2f} of the goal"
    return f"{text}; {failures}" if failures else text


def _rows(count: int) -> str:
    return f"{count} {'row' if count == 1 else 'rows'}"


def main(args: list[str] | None = None) -> int:
    """Print every goal; the exit code says nothing about them."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.goals", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    options = parser.parse_args(args)
    from rich.console import Console
    from rich.table import Table

    verdicts = judge_all(read_devices(options.results), load_anchors())
    table = Table("goal", "wanted", "device", "how it stands", title_justify="left")
    for verdict in verdicts:
        table.add_row(verdict.goal.name, wanted(verdict.goal), verdict.device or "", outcome(verdict))
    Console().print(table)
    counts = {status: sum(v.status == status for v in verdicts) for status in (MET, SHORT, NOT_MEASURED)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
