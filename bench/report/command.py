"""Draw and write what was measured: ``python -m bench.report``; ``--check`` only compares.

It reads every results JSON, draws charts into ``docs``, writes ``bench/results/REPORT.md`` and the tables
of docs/benchmarks.md, and prints the tables.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from bench.report import native_table, page
from bench.report.anchors import Anchors, load_anchors
from bench.report.charts import draw
from bench.report.goals import judge_all
from bench.report.rows import Device, read_devices
from bench.report.tables import facts_sheet, goals_sheet, op_sheet, report_text
from florence_fast.files import write_text

RESULTS = page.RESULTS
DOCS = page.ROOT / "docs"


def main(args: list[str] | None = None) -> int:
    """Write the report; the exit code is 1 if ``--check`` finds one that differs, 2 if a file is no result."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the charts (docs)")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if REPORT.md or docs/benchmarks.md differ from the results"
    )
    options = parser.parse_args(args)
    try:
        devices, anchors = read_devices(options.results), load_anchors()
        natives = native_table.read_all(options.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    ours = options.results.resolve() == RESULTS.resolve()
    if options.check:
        return check(options.results, devices, anchors, with_page=ours)
    if (devices or natives) and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no charts; on a machine that has it, run this again")
    else:
        drawn = [path for device in devices for path in draw(device, anchors, options.docs)]
        for path in drawn + [native_table.draw(table, options.docs) for table in natives]:
            print(f"drawn: {path}")
    print(f"written: {write_text(options.results / 'REPORT.md', report_text(devices, anchors))}")
    if ours:  # other results are no matter of this page
        print(f"written: {page.write()}")
    show(devices, anchors)
    for table in natives:
        native_table.show(table)
    return 0


def check(results: Path, devices: list[Device], anchors: Anchors, with_page: bool) -> int:
    """Compare what is written with what the results give."""
    stale = []
    path = results / "REPORT.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != report_text(devices, anchors):
        stale.append(str(path))
    if with_page:
        text = page.PAGE.read_text(encoding="utf-8")
        if page.fill(text) != text:
            stale.append(str(page.PAGE))
    for name in stale:
        print(f"{name} differs from {results}: run python -m bench.report", file=sys.stderr)
    return int(bool(stale))


def show(devices: list[Device], anchors: Anchors) -> None:
    """Print the tables; where rich is missing, as they stand in REPORT.md."""
    sheets = []
    for device in devices:
        ops = dict.fromkeys(row["op"] for row in device.rows)
        sheets += [facts_sheet(device), *(op_sheet(device, op) for op in ops)]
    sheets.append(goals_sheet(judge_all(devices, anchors)))
    if importlib.util.find_spec("rich") is None:
        print("\n\n".join(f"{sheet.title}\n\n{sheet.markdown()}" for sheet in sheets))
        return
    from rich.console import Console

    console = Console()
    for sheet in sheets:
        console.print(sheet.rich())


if __name__ == "__main__":
    sys.exit(main())
