"""The goals of the native CPU backend beside what ``bench.cpu.native`` measured: a table, a chart, the page's part.

A comparison counts with the fastest of those that a goal names, over ours; a goal is held to the worst of its
comparisons.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cpu.native_rows import start, step, threads, towers
from bench.cpu.native_rows.base import OURS, WHAT_DECIDES
from bench.cpu.native_rows.windows import OUR_TORCH
from bench.machine import recorded, where
from bench.report.goals import MET, NOT_MEASURED, SHORT
from bench.report.tables import Sheet, milliseconds
from bench.store import Row
from florence_fast.files import replacing

RESULTS = Path(__file__).parents[1] / "results"
HEAD = ["work", "beside", "goal", "geometric mean", "worst", "which is", "ms, ours", "ms, theirs", "how it stands"]
PRINTED_WIDTH = 200
"""In a file, where no terminal says how wide it is."""


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    work: str
    op: str
    dtype: str
    mode: str
    against: tuple[str, ...]
    """The competitors of which the fastest counts."""
    at_least: float
    """How many times as fast ours is to be."""
    beside: str = ""
    """What the table calls the competitors: their names by default."""
    ours: str = OURS


@dataclass(frozen=True)
class Cost:
    """A line that limits what an alternation may cost over the sum of its parts."""

    work: str
    op: str
    at_most: float
    beside: str


@dataclass(frozen=True)
class Value:
    """One comparison as a goal sees it."""

    shape: str
    value: float
    ours: float
    theirs: float


@dataclass(frozen=True)
class Verdict:
    """How a goal stands."""

    goal: Goal | Cost
    values: tuple[Value, ...] = ()
    failed: tuple[str, ...] = ()
    """Comparisons in which ours ended with an error: a goal with one of them is not met."""

    @property
    def worst(self) -> Value:
        return (max if isinstance(self.goal, Cost) else min)(self.values, key=lambda found: found.value)

    @property
    def mean(self) -> float:
        return math.exp(sum(math.log(found.value) for found in self.values) / len(self.values))

    def reached(self, value: float) -> float:
        """Return how much of the goal a value is: 1 or more where it is met."""
        return (1 + self.goal.at_most) / value if isinstance(self.goal, Cost) else value / self.goal.at_least

    @property
    def status(self) -> str:
        if not self.values:
            return SHORT if self.failed else NOT_MEASURED
        return MET if self.reached(self.worst.value) >= 1 and not self.failed else SHORT


@dataclass
class Table:
    """The rows of one file."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    @property
    def machine(self) -> str:
        first = self.rows[0]
        return f"{where(first)}, level {first['level']}, {first['threads']} threads, torch {first['torch']}"

    @property
    def chart(self) -> str:
        return f"cpu_native_{self.rows[0]['level']}.png"


def file_name(level: str) -> str:
    """Return the name of the file that holds the rows of an instruction set."""
    return f"cpu-{level}.json"


PLAIN = ("SDPA", "matmul and softmax", OUR_TORCH)
GOALS: tuple[Goal | Cost, ...] = (
    *(
        Goal(f"window attention, {said}", "window_attention", dtype, mode, PLAIN, least, "the fastest of the others")
        for mode, said, least_of in (
            ("forward", "forward", {"bf16": 4.0, "fp32": 2.0}),
            ("both", "forward and backward", {"bf16": 2.0, "fp32": 1.5}),
        )
        for dtype, least in least_of.items()
    ),
    *(
        Goal(work, op, dtype, "forward", ("eager",), least)
        for work, op, least_of in (
            ("layer norm of a sum", "layer_norm_residual", {"bf16": 2.0, "fp32": 2.0}),
            ("bias and GELU", "bias_gelu", {"bf16": 3.0, "fp32": 2.0}),
        )
        for dtype, least in least_of.items()
    ),
    *(
        Goal(f"Swin-T and Swin-B, {said}", "inference", dtype, "forward", (against,), least, ours=ours)
        for dtype, against, least in (
            ("bf16", towers.EAGER, 2.2),
            ("bf16", towers.COMPILED, 1.4),
            ("fp32", towers.EAGER, 1.25),
        )
        for said, ours in (("our models", OURS), ("Hugging Face's, accelerated", towers.ACCELERATED))
    ),
    Goal("training step of florence_tiny", "training_step", "bf16", "both", (step.REFERENCE,), 1.6),
    Goal("first result after the imports", "first_result", "fp32", "forward", (start.COMPILED,), 20.0),
    Cost("native op and product, alternating", "threads", 0.05, "the sum of each alone"),
)


FIELDS = (
    *("op", "shape", "dtype", "mode", "times", "missing", "errors", "level", "threads", "device"),
    *("date", "sources", "torch", "triton"),
)
"""What every row of a file holds."""


def read(path: Path) -> Table | None:
    """Read one file of results; None where there are no rows.

    Raises:
        ValueError: it is no such file.
    """
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            for name in FIELDS:
                row[name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold rows of bench.cpu.native, got {type(error).__name__}: {error}") from error
    return Table(path, rows) if rows else None


def read_all(folder: Path) -> list[Table]:
    """Read the results of every instruction set in a folder."""
    return [table for path in sorted(folder.glob(file_name("*"))) if (table := read(path)) is not None]


def judge(goal: Goal | Cost, rows: Iterable[Row]) -> Verdict:
    """Hold the rows to one goal."""
    values, failed = [], []
    for row in rows:
        if row["op"] != goal.op or (isinstance(goal, Goal) and (row["dtype"], row["mode"]) != (goal.dtype, goal.mode)):
            continue
        times = {name: time["median"] for name, time in row["times"].items()}
        if isinstance(goal, Cost):
            ours, parts = (
                times.get(threads.ALTERNATING),
                [times.get(name) for name in (threads.NATIVE, threads.PRODUCT)],
            )
            theirs = None if None in parts else sum(parts)
            wrong = next(iter(row["errors"].values()), None)
        else:
            ours = times.get(goal.ours)
            theirs = min((times[name] for name in goal.against if name in times), default=None)
            wrong = row["errors"].get(goal.ours)
        shape = f"{row['shape']}, {row['dtype']}" if isinstance(goal, Cost) else row["shape"]
        if wrong is not None:
            failed.append(f"{shape}: {wrong}")
        if ours is not None and theirs is not None:
            value = ours / theirs if isinstance(goal, Cost) else theirs / ours
            values.append(Value(shape, value, ours, theirs))
    return Verdict(goal, tuple(values), tuple(failed))


def judge_all(table: Table) -> list[Verdict]:
    """Hold the rows to every goal."""
    return [judge(goal, table.rows) for goal in GOALS]


def shown(goal: Goal | Cost, value: float) -> str:
    """Write a value as its goal is written.

    >>> shown(GOALS[0], 4.123), shown(GOALS[-1], 1.034)
    ('4.12x', '+3.4%')
    """
    return f"{value - 1:+.1%}" if isinstance(goal, Cost) else f"{value:.2f}x"


def wanted(goal: Goal | Cost) -> str:
    """Write what a goal asks for."""
    return f"at most +{goal.at_most:.0%}" if isinstance(goal, Cost) else f"at least {goal.at_least:g}x"


def outcome(verdict: Verdict) -> str:
    """Say how a goal stands, and by how much its worst comparison is short of it."""
    if verdict.failed:
        return f"{SHORT}: {len(verdict.failed)} with an error ({verdict.failed[0]})"
    if verdict.status != SHORT:
        return verdict.status
    short = 1 - verdict.reached(verdict.worst.value)
    passing = sum(verdict.reached(found.value) >= 1 for found in verdict.values)
    return f"short by {short:.1%}; {passing} of {len(verdict.values)} reach it"


def sheet(table: Table) -> Sheet:
    """Return the table."""
    rows = []
    for verdict in judge_all(table):
        goal = verdict.goal
        work = goal.work if isinstance(goal, Cost) else f"{goal.work}, {goal.dtype}"
        beside = goal.beside or ", ".join(goal.against)
        figures = ["", "", "", "", ""]
        if verdict.values:
            worst, mean = verdict.worst, shown(goal, verdict.mean) if len(verdict.values) > 1 else ""
            times = [milliseconds(worst.ours), milliseconds(worst.theirs)]
            figures = [mean, shown(goal, worst.value), worst.shape, *times]
        rows.append([work, beside, wanted(goal), *figures, outcome(verdict)])
    return Sheet(table.machine, HEAD, rows)


def page_text(tables: list[Table]) -> str:
    """Return what docs/benchmarks.md shows: a table for each instruction set."""
    parts = []
    for table in tables:
        when = recorded(table.rows, WHAT_DECIDES)
        parts.append(f"{table.machine}; medians of turns, `{table.path.name}`; {when}.")
        parts += [sheet(table).markdown(), f"![Each goal, and how many times as fast we are]({table.chart})"]
    return "\n\n".join(parts) or f"{NOT_MEASURED.capitalize()}."


def show(table: Table) -> None:
    """Print the table; where rich is missing, as docs/benchmarks.md shows it."""
    found = sheet(table)
    if importlib.util.find_spec("rich") is None:
        print(f"{found.title}\n\n{found.markdown()}")
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else PRINTED_WIDTH).print(found.rich())


def draw(table: Table, folder: Path) -> Path:
    """Draw a bar for each goal: how many times as fast ours is, with its comparisons as dots and the goal as a tick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, ScalarFormatter

    verdicts = [verdict for verdict in judge_all(table) if verdict.values]
    whole, axes = plt.subplots(figsize=(10, 1.6 + 0.34 * len(verdicts)), dpi=100, layout="constrained")
    for place, verdict in enumerate(verdicts):
        goal = verdict.goal
        times, wanted_times = [_times(goal, found.value) for found in verdict.values], _times(goal, _asked(goal))
        mean = _times(goal, verdict.mean)
        axes.barh(place, mean - LEFT, 0.62, LEFT, color=REACHED if verdict.status == MET else NOT_REACHED, alpha=0.75)
        axes.plot(times, [place] * len(times), "o", color="#333333", markersize=3, alpha=0.6)
        axes.plot([wanted_times], [place], "|", color="black", markersize=17, markeredgewidth=2)
        written = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(shown(goal, verdict.mean), (max(mean, wanted_times, *times), place), (6, 0), **written)
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=LEFT)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(LogLocator(10, subs=()))
    axes.set_yticks(range(len(verdicts)), [_label(verdict) for verdict in verdicts], fontsize=7)
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.set_xlabel("times as fast as the competitor, logarithmic", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    handles = [
        Patch(color=REACHED, alpha=0.75, label="geometric mean, every comparison reaches the goal"),
        Patch(color=NOT_REACHED, alpha=0.75, label="geometric mean, not every one does"),
        Line2D([], [], linestyle="", marker="|", color="black", markersize=12, markeredgewidth=2, label="the goal"),
        Line2D([], [], linestyle="", marker="o", color="#333333", markersize=4, alpha=0.6, label="a comparison"),
    ]
    whole.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    whole.suptitle(table.machine, fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / table.chart) as beside:
        whole.savefig(beside, format="png")
    plt.close(whole)
    return folder / table.chart


REACHED, NOT_REACHED = "#54a24b", "#e9a23b"
LEFT = 0.5  # where the chart's bars begin: half as fast as the competitor


def _asked(goal: Goal | Cost) -> float:
    return 1 + goal.at_most if isinstance(goal, Cost) else goal.at_least


def _times(goal: Goal | Cost, value: float) -> float:
    """Return how many times as fast ours is; a cost over the sum of the parts is a little less than once."""
    return 1 / value if isinstance(goal, Cost) else value


def _label(verdict: Verdict) -> str:
    goal: Any = verdict.goal
    dtype = "" if isinstance(goal, Cost) else f", {goal.dtype}"
    return f"{goal.work}{dtype}\nbeside {goal.beside or ', '.join(goal.against)}: {wanted(goal)}"
