"""Everything that waits for a GPU, in one command: ``make gpu``, or ``python -m bench.gpu`` from the checkout.

It installs nothing. Results are stored after every row and a later start goes on from them, so short slots add up.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.stages import Stage
    from bench.session import Session

RESULTS = Path(__file__).parents[1] / "results"
LOGS = Path(__file__).parents[2] / "runs" / "gpu"
REHEARSAL_MINUTES = 60
"""A rehearsal is no lease of a machine: it ends with its last row, on a busy machine too."""


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="stop between two rows after this time (9)")
    parser.add_argument("--stage", action="append", metavar="NAME", help="run this stage only; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored already")
    parser.add_argument("--full", action="store_true", help="also competitors that take minutes to compile")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU with tiny shapes")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    """Run the stages; the exit code is 1 if one failed, 2 if the command is wrong."""
    options = parse(args)
    if options.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported, which is below
    try:
        import torch
    except ImportError:
        return without_torch()
    from bench.gpu.stages import stages

    chosen, known = stages(), [stage.name for stage in stages()]
    for name in options.stage or ():
        if name not in known:
            print(f"unknown stage {name!r}; known: {', '.join(known)}", file=sys.stderr)
            return 2
    chosen = [stage for stage in chosen if stage.always or not options.stage or stage.name in options.stage]
    if not options.rehearse and not torch.cuda.is_available():
        names = ", ".join(stage.name for stage in chosen)
        print(f"No GPU that PyTorch can use, so nothing was measured; with one, this runs: {names}.")
        return 0
    session = open_session(options, torch.device("cpu" if options.rehearse else "cuda"))
    session.show(f"results: {session.store.path}")
    records = {}
    for stage in chosen:
        if options.fresh:
            session.store.forget(stage.name)
        records[stage.name] = run_stage(stage, session)
        if stage.always and records[stage.name]["status"] == "failed":
            break  # the others would have nothing to be set beside
    write_report(session)
    print_table(records)
    return int(any(record["status"] == "failed" for record in records.values()))


def without_torch() -> int:
    """Say what is missing; only where there is a GPU is that a mistake."""
    if shutil.which("nvidia-smi") is None:
        print("No GPU and no PyTorch here, so nothing was measured; bench/GPU_QUEUE.md lists what runs with them.")
        return 0
    print(f"PyTorch is not installed for {sys.executable}: make gpu PYTHON=... picks another Python", file=sys.stderr)
    return 2


def open_session(options: argparse.Namespace, device: Any) -> "Session":
    """Find the stored results of this device and start the clock."""
    from bench.machine import Clock, facts, slug
    from bench.session import Plan, Session
    from bench.store import Store

    # Rows are of the tables that the repository holds, not of what this user's cache does.
    os.environ.pop("FLORENCE_FAST_AUTOTUNE", None)
    found = facts(device)
    folder = options.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else RESULTS)
    logs = LOGS if folder == RESULTS else folder
    for path in (folder, logs):
        path.mkdir(parents=True, exist_ok=True)
    store = Store(folder / f"gpu_{slug(found['device'])}.json", found["sources"])
    return Session(
        device,
        found,
        store,
        logs,
        Clock(REHEARSAL_MINUTES if options.rehearse else options.minutes),
        Plan(options.rehearse, options.full),
        seconds=0.01 if options.rehearse else 0.3,
        show=lambda line: print(line, flush=True),
    )


def run_stage(stage: "Stage", session: "Session") -> dict[str, Any]:
    """Run one stage, store how it ended, and let nothing that goes wrong in it stop the others."""
    from bench.gpu.stages import StageFailed, StageSkipped
    from bench.session import OutOfTime

    if stage.once and session.store.stage_finished(stage.name):
        session.show(f"[{stage.name}] finished at an earlier start")
        return session.store.stages[stage.name]
    session.show(f"[{stage.name}] {stage.what}")
    start, record = time.monotonic(), {"status": "done", "reason": None}
    try:
        session.check_time()
        record["details"] = stage.run(session)
    except OutOfTime:
        record |= {"status": "to go on", "reason": "the time is over; start again to go on"}
    except StageSkipped as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    except StageFailed as error:
        record |= {"status": "failed", "reason": str(error), "details": error.details}
    except Exception as error:
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    record |= {"seconds": round(time.monotonic() - start, 1)}
    record |= {name: session.facts[name] for name in ("sources", "commit", "date")}
    session.store.put_stage(stage.name, record)
    return record


def write_report(session: "Session") -> None:
    """Draw and write what all runs have measured; a rehearsal's report stays in its folder."""
    from bench.report import command as report

    folder = session.store.path.parent
    docs = report.DOCS if folder == RESULTS else folder / "docs"
    report.main(["--results", str(folder), "--docs", str(docs)])
    if folder == RESULTS:
        from bench.gpu import queue

        queue.main([])


def print_table(records: dict[str, dict[str, Any]]) -> None:
    """Print how each stage ended."""
    print(f"\n{'stage':28} ended     seconds")
    for name, record in records.items():
        reason = " ".join(str(record["reason"] or "").split())[:100]
        print(f"{name:28} {record['status']:9} {record['seconds']:7.1f}  {reason}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
