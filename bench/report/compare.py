"""Compare two runs on one device: ``python -m bench.report.compare old.json new.json``; exit code 1 on a regression.

A time counts as changed only where the medians differ by more than the spread of either row, from its 20% to its 80%
quantile, where these ranges do not meet, and by a least ratio: what repeats of one run differ by is no change.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.report.rows import is_ours, read_rows
from bench.report.tables import Sheet, milliseconds
from bench.store import Row

MIN_RATIO = 1.05
FASTER, SLOWER, SAME, BROKEN, GONE, NEW = "faster", "slower", "same", "broken", "only in the old", "only in the new"
RATES = {"copy_bytes_per_second": "copy bandwidth", "matrix_flops_per_second": "rate of products"}


@dataclass(frozen=True)
class Change:
    """One row in both files, or in one of them."""

    key: str
    verdict: str
    old: Row | None = None
    new: Row | None = None
    ratio: float | None = None
    """New median over old: above 1 is slower."""

    @property
    def is_regression(self) -> bool:
        return self.verdict in (SLOWER, BROKEN)


def verdict_of(old: Row, new: Row, min_ratio: float) -> str:
    """Say what became of a row that both files hold.

    A competitor that is not installed now has not become slower; one that gives an error or wrong values now is broken,
    and so is a backend of ours that cannot run now.
    """
    if old["status"] != "timed":
        return NEW if new["status"] == "timed" else SAME
    if new["status"] != "timed":
        return GONE if new["status"] == "missing" and not is_ours(new) else BROKEN
    spread = max(row["q80"] - row["q20"] for row in (old, new))
    low, high, verdict = (old, new, SLOWER) if new["median"] > old["median"] else (new, old, FASTER)
    clear = high["q20"] > low["q80"] and high["median"] - low["median"] > spread
    return verdict if clear and high["median"] >= min_ratio * low["median"] else SAME


def compare(old: list[Row], new: list[Row], min_ratio: float = MIN_RATIO) -> list[Change]:
    """Return every row's change: the broken first, then by ratio from the slowest, those in one file only last.

    Raises:
        ValueError: the rows are of different devices, there are none, or ``min_ratio`` is below 1.
    """
    if not min_ratio >= 1:
        raise ValueError(f"min_ratio must be at least 1, got {min_ratio}")
    if not old or not new:
        raise ValueError(f"both runs must hold rows to compare, got {len(old)} and {len(new)}")
    devices = [sorted({row["device"] for row in rows}) for rows in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(
            f"both runs must be of one device, got {', '.join(devices[0])} and {', '.join(devices[1])}: "
            "times of different devices say nothing about a change of the code"
        )
    before, after = ({row["key"]: row for row in rows} for rows in (old, new))
    changes = []
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            changes.append(Change(key, NEW if a is None else GONE, a, b))
            continue
        both = a["status"] == b["status"] == "timed"
        changes.append(Change(key, verdict_of(a, b, min_ratio), a, b, b["median"] / a["median"] if both else None))
    return sorted(changes, key=lambda change: (change.verdict != BROKEN, change.ratio is None, -(change.ratio or 0)))


def changes_sheet(changes: list[Change], every: bool) -> Sheet:
    """Return the table of the rows that changed, or with ``every`` of all."""
    rows = [
        [
            change.key.replace("|", " "),
            _spread(change.old),
            _spread(change.new),
            "" if change.ratio is None else f"{change.ratio:.3f}",
            change.verdict,
        ]
        for change in changes
        if every or change.verdict != SAME
    ]
    return Sheet(
        "rows by new / old", ["row", "old, ms (20% to 80%)", "new, ms (20% to 80%)", "new / old", "verdict"], rows
    )


def _spread(row: Row | None) -> str:
    if row is None or row["status"] != "timed":
        return "" if row is None else row["status"]
    return f"{milliseconds(row['median'])} ({milliseconds(row['q20'])} to {milliseconds(row['q80'])})"


def drifts(old: list[Row], new: list[Row], min_ratio: float) -> list[str]:
    """Say where the device itself was not the same in both runs: its clocks, its memory, another load."""
    said = []
    for name, what in RATES.items():
        rates = [[row[name] for row in rows if row.get(name)] for rows in (old, new)]
        if all(rates):
            a, b = (sum(found) / len(found) for found in rates)
            if max(a / b, b / a) >= min_ratio:
                said.append(f"the {what} of the new run is {b / a:.3f} of the old one's: the device was not the same")
    return said


def main(args: list[str] | None = None) -> int:
    """Compare two files; the exit code is 1 if a row is slower or broken, 2 if they cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="results JSON of the earlier run")
    parser.add_argument("new", type=Path, help="results JSON of the later run")
    parser.add_argument("--min-ratio", type=float, default=MIN_RATIO, help=f"smallest change that counts ({MIN_RATIO})")
    parser.add_argument("--ours", action="store_true", help="only rows of this package, not those of competitors")
    parser.add_argument("--all", action="store_true", help="show the rows that are the same, too")
    options = parser.parse_args(args)
    try:
        old, new = read_rows(options.old), read_rows(options.new)
        if options.ours:
            old, new = ([row for row in rows if is_ours(row)] for rows in (old, new))
        changes = compare(old, new, options.min_ratio)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    sheet = changes_sheet(changes, options.all)
    if sheet.rows:
        from rich.console import Console

        Console().print(sheet.rich())
    for line in drifts(old, new, options.min_ratio):
        print(f"note: {line}")
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    return int(any(change.is_regression for change in changes))


VERDICTS = (BROKEN, SLOWER, FASTER, SAME, GONE, NEW)

if __name__ == "__main__":
    sys.exit(main())
