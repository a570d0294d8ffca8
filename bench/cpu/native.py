"""What the native CPU backend gains: ``make bench-cpu``, or ``python -m bench.cpu.native`` from the checkout.

Every figure that the backend is to reach is measured on this machine's processor, competitors taking turns in one
process at torch's number of threads, each at least nine times. Every subject has a process of its own, so that its
figures do not depend on what was measured before. A row is stored as soon as it is made, in
``bench/results/cpu-<level>.json`` for the instruction set in force; a later start makes only those that are missing or
whose sources have changed. At the end the table is printed, with our figures beside the goals, and drawn.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.cpu.native_rows import rows_of_a_block, start, step, threads, towers, windows
from bench.cpu.native_rows.base import WHAT_DECIDES, Run
from bench.cpu.rows.base import CPU
from bench.machine import Clock, facts, sources, version
from bench.report import native_table, page
from bench.store import Store
from florence_fast import native, processor

DOCS = page.ROOT / "docs"
SUBJECTS = {
    "windows": windows,
    "rows": rows_of_a_block,
    "towers": towers,
    "step": step,
    "start": start,
    "threads": threads,
}
QUIET = 0.5
"""The load that others may put on the machine, in processes, before figures are doubtful."""


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.native", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="begin no comparison after this time (15)")
    parser.add_argument("--turns", type=int, default=9, help="the least number of repetitions of each competitor (9)")
    parser.add_argument("--only", action="append", choices=SUBJECTS, metavar="NAME", help="|".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="leave out what torch.compile takes minutes to compile")
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored already")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything with tiny sizes, stored in a passing folder"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results); the chart then lies there")
    options = parser.parse_args(args)
    if options.turns < 2:
        parser.error(f"--turns must be at least 2, got {options.turns}")
    return options


def main(args: list[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a row of this run has an error, 2 if the extension is absent."""
    options = parse(args)
    if native.extension() is None:
        print(native.reasons()[0], file=sys.stderr)
        return 2
    folder = options.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else native_table.RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.minutes)
    failed = False
    for name in options.only or SUBJECTS:
        if options.rehearse:
            failed |= _measure(name, options, folder, clock)
        else:
            # The limit is one for all: a child begins its comparisons in the time that is left.
            child = get_context("spawn").Process(target=_measure_and_exit, args=(name, options, folder, clock))
            child.start()
            child.join()
            failed |= child.exitcode != 0
    if clock.left() <= 0:
        print(f"{options.minutes:g} minutes are over: run this again for the rows that are still missing")
    _report(folder / native_table.file_name(native.level()), folder, options.rehearse)
    return int(failed)


def _measure_and_exit(*args: Any) -> None:
    sys.exit(_measure(*args))


def _measure(name: str, options: argparse.Namespace, folder: Path, clock: Clock) -> bool:
    """Make the rows of one subject, and say whether one of them has an error."""
    run = _run(name, options, folder, clock)
    run.show(f"[{name}] {SUBJECTS[name].__doc__.splitlines()[0]}")
    SUBJECTS[name].measure(run)
    return any(run.store.rows[key]["errors"] for key in run.finished)


def _run(name: str, options: argparse.Namespace, folder: Path, clock: Clock) -> Run:
    """Prepare the run, and say on what."""
    level = native.level()
    found = facts(CPU) | {"level": level, "threads": torch.get_num_threads(), "transformers": version("transformers")}
    found |= {"processor": processor.name(), "sources": sources(WHAT_DECIDES)}
    found |= {"load_at_start": round(os.getloadavg()[0], 1)}
    store = Store(folder / native_table.file_name(level), found["sources"])
    if options.fresh:
        for op in SUBJECTS[name].OPS:
            store.forget(op)
    run = Run(found, store, clock, options.turns, tiny=options.rehearse, quick=options.quick)
    run.show = lambda line: print(line, flush=True)
    run.show(f"{level}, {found['threads']} threads, torch {found['torch']}; results: {store.path}")
    if found["load_at_start"] > QUIET and not options.rehearse:
        run.show(f"others keep {found['load_at_start']} processes busy here: figures to keep want a quiet machine")
    return run


def _report(path: Path, folder: Path, rehearsed: bool) -> None:
    """Print the table, draw it, and write the page if the results are its own."""
    table = native_table.read(path)
    if table is None:
        return
    kept = folder.resolve() == native_table.RESULTS.resolve()
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no chart; on a machine that has it, run python -m bench.report")
    else:
        print(f"drawn: {native_table.draw(table, DOCS if kept else folder / 'docs')}")
    if kept and not rehearsed:
        print(f"written: {page.write()}")
    native_table.show(table)


if __name__ == "__main__":
    sys.exit(main())
