"""Figures that others published, the peak rates of devices, and our goals, from ``bench/anchors.json``.

A published figure was measured elsewhere, on other machines and often at other sizes: it is drawn beside our rows under
the word "published" and never stands in one column with them.
"""

import json
import math
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

ANCHORS = Path(__file__).parents[1] / "anchors.json"
MODES = ("forward", "backward", "both")
UNITS = ("TFLOP/s", "GB/s", "images/s", "ms", "GB", "% MFU", "x eager")
METRICS = ("copy_ratio", "roofline", "mfu", "speedup", "milliseconds", "seconds", "memory", "batch")
GPU = "GPU"

Entry = TypeVar("Entry", "Source", "Published", "Peak", "Goal")


@dataclass(frozen=True)
class Source:
    """Where a figure stands, and how it was measured there."""

    title: str
    url: str
    device: str
    setup: str
    date: str | None = None
    """ISO date; None where the source has none."""


@dataclass(frozen=True)
class Published:
    """One figure of others."""

    source: str
    by: str
    op: str
    mode: str
    sizes: dict[str, Any]
    value: float
    unit: str
    dtype: str | None = None


@dataclass(frozen=True)
class Peak:
    """The rate of dense 16-bit products that a device's maker states."""

    device: str
    flops_per_second: float
    source: str


@dataclass(frozen=True)
class Goal:
    """What our rows of one op must reach: the worst row that matches decides, or with ``of="best"`` the best."""

    name: str
    op: str
    metric: str
    mode: str
    where: dict[str, Any] = field(default_factory=dict)
    """Entries of a row's sizes that must be equal, or be one of a list."""
    dtype: str | None = None
    device: str | None = None
    """``GPU``, or a part of the device's name; None for any."""
    ours: str = "ours (triton)"
    against: str | None = None
    """For a speedup: "best" of the competitors, or what the competitor's name begins with."""
    of: str = "worst"
    at_least: float | None = None
    at_most: float | None = None
    bytes_per_value: float = 0
    plus_bytes: float = 0
    """``memory`` is the peak over ``bytes_per_value`` B D + ``plus_bytes``."""

    @property
    def threshold(self) -> float:
        return self.at_least if self.at_least is not None else self.at_most

    def reached(self, value: float) -> float:
        """Return how much of the goal a value is: 1 or more where the goal is met."""
        if self.at_least is not None:
            return value / self.at_least
        return self.at_most / value


@dataclass(frozen=True)
class Anchors:
    """The whole file."""

    sources: dict[str, Source]
    published: list[Published]
    peaks: list[Peak]
    goals: list[Goal]

    def peak(self, device: str) -> float | None:
        """Return the stated FLOPs a second of a device; None for one that is not in the file."""
        return next((peak.flops_per_second for peak in self.peaks if peak.device in device), None)


def load_anchors(path: Path = ANCHORS) -> Anchors:
    """Read and check the file.

    Raises:
        ValueError: an entry is not what it must be; the message says which, and what was wanted.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        sources = {name: _entry(Source, f"sources.{name}", values) for name, values in dict(stored["sources"]).items()}
        published, peaks, goals = (
            [_entry(kind, f"{name}[{number}]", values) for number, values in enumerate(stored[name])]
            for name, kind in (("published", Published), ("peaks", Peak), ("goals", Goal))
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must hold sources, published, peaks and goals, got {type(error).__name__}: {error}"
        ) from error
    for name, source in sources.items():
        _require(source.url.startswith("https://"), f"sources.{name}.url", "begin with https://", source.url)
    for number, figure in enumerate(published):
        _check_published(f"published[{number}]", figure, sources)
    for number, goal in enumerate(goals):
        _check_goal(f"goals[{number}]", goal)
    return Anchors(sources, published, peaks, goals)


def _entry(kind: type[Entry], name: str, values: Any) -> Entry:
    """Make an entry of the file, with exactly the keys and the types that its class names."""
    _require(isinstance(values, dict), name, "be an object", values)
    known = {each.name: each for each in fields(kind)}
    needed = [n for n, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    missing, unknown = [n for n in needed if n not in values], [n for n in values if n not in known]
    _require(not missing, name, f"have {', '.join(missing)}", sorted(values))
    _require(not unknown, name, f"have no other keys than {', '.join(known)}", unknown)
    for key, value in values.items():
        _require(_fits(value, known[key].type), f"{name}.{key}", f"be {_words(known[key].type)}", value)
    return kind(**values)


def _kinds(wanted: Any) -> tuple[type, ...]:
    options = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    return tuple(get_origin(option) or option for option in options)


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool):  # which Python takes for an int
        return False
    if isinstance(value, int | float):
        return float in _kinds(wanted) and 0 <= value < math.inf  # JSON knows NaN and Infinity
    return isinstance(value, _kinds(wanted))


def _words(wanted: Any) -> str:
    names = {str: "a text", dict: "an object", float: "a number of at least 0", type(None): "null"}
    return " or ".join(names[kind] for kind in _kinds(wanted))


def _check_published(name: str, figure: Published, sources: Collection[str]) -> None:
    _require(figure.source in sources, f"{name}.source", f"be one of {', '.join(sources)}", figure.source)
    _require(figure.mode in MODES, f"{name}.mode", f"be one of {', '.join(MODES)}", figure.mode)
    _require(figure.unit in UNITS, f"{name}.unit", f"be one of {', '.join(UNITS)}", figure.unit)
    _require(figure.value > 0, f"{name}.value", "be above 0", figure.value)


def _check_goal(name: str, goal: Goal) -> None:
    _require(goal.metric in METRICS, f"{name}.metric", f"be one of {', '.join(METRICS)}", goal.metric)
    _require(goal.mode in MODES, f"{name}.mode", f"be one of {', '.join(MODES)}", goal.mode)
    _require(goal.of in ("worst", "best"), f"{name}.of", "be worst or best", goal.of)
    limits = [limit for limit in (goal.at_least, goal.at_most) if limit is not None]
    _require(len(limits) == 1 and limits[0] > 0, name, "have one of at_least and at_most, above 0", limits)
    compared = goal.metric == "speedup"
    _require(
        compared == (goal.against is not None), f"{name}.against", "be there for a speedup and only then", goal.against
    )
    allowed = goal.bytes_per_value + goal.plus_bytes > 0
    _require(
        allowed == (goal.metric == "memory"), f"{name}.bytes_per_value", "be there for memory and only then", allowed
    )


def _require(right: bool, name: str, wanted: str, got: Any) -> None:
    if not right:
        raise ValueError(f"anchors: {name} must {wanted}, got {got!r}")
