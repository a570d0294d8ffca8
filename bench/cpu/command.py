"""What can be measured without a GPU: ``make bench``, or ``python -m bench.cpu`` from the checkout.

Competitors take turns, so that whatever else the machine does meets all alike; each row is stored as soon as it is
made, and a later start makes only those that are missing or whose sources have changed. The report is drawn at the
end (``python -m bench.report``).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from bench.cpu.rows import contrastive, grad_cache, models, start
from bench.cpu.rows.base import CPU, Run
from bench.machine import Clock, copy_bandwidth, facts, matrix_rate
from bench.store import Store

RESULTS = Path(__file__).parents[1] / "results"
SUBJECTS = {"contrastive": contrastive, "models": models, "grad_cache": grad_cache, "start": start}


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=14, help="begin no comparison after this time (14)")
    parser.add_argument("--only", action="append", choices=SUBJECTS, metavar="NAME", help="|".join(SUBJECTS))
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored already")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything with tiny sizes, stored in a passing folder"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a row ended with an error."""
    options = parse(args)
    folder = options.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    found = facts(CPU) | {"threads": torch.get_num_threads()}
    found["copy_bytes_per_second"] = copy_bandwidth(CPU, small=options.rehearse)
    found["matrix_flops_per_second"] = matrix_rate(CPU, small=options.rehearse)
    store = Store(folder / "cpu.json", found["sources"])
    run = Run(found, store, Clock(options.minutes), tiny=options.rehearse, show=lambda line: print(line, flush=True))
    run.show(f"{found['device']}, {found['threads']} threads, torch {found['torch']}; results: {store.path}")
    for name in options.only or SUBJECTS:
        run.show(f"[{name}] {SUBJECTS[name].__doc__.splitlines()[0]}")
        SUBJECTS[name].measure(run)
    from bench.report import command as report

    report.main(["--results", str(folder), "--docs", str(report.DOCS if folder == RESULTS else folder / "docs")])
    return int(any(store.rows[key]["status"] == "error" for key in run.finished))


if __name__ == "__main__":
    sys.exit(main())
