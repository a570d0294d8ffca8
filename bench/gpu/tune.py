"""Find the fastest launch configuration of every kernel: ``python -m bench.gpu.tune [--op NAME] [--minutes M]``.

For each size of the paper's models and each dtype it lists configurations around the default, drops those that the
static budget excludes, compares the values of the others with the default's, times them, and writes the winners to
``kernels/configs/sm_<arch>.json``. ``bench/results/tuning/sm_<arch>.json`` keeps every time with its provenance, and
a later start goes on from there. ``--apply`` writes the tables from those files, without a GPU.
"""

import argparse
import os
import sys
from pathlib import Path

from bench.gpu.command import RESULTS, open_session


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", metavar="NAME", help="a file of bench/ops; may be repeated (all)")
    parser.add_argument("--minutes", type=float, default=9, help="stop between two measurements after this time (9)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded already")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; changes no table")
    parser.add_argument("--apply", action="store_true", help="write the tables from the records, and measure nothing")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    parser.set_defaults(full=False)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    """Tune; the exit code is 1 if values or the device failed, 2 if the command is wrong."""
    options = parse(args)
    if options.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported, which is below
    import torch

    from bench.gpu.tune_search import run, tuned
    from bench.session import DeviceLost, OutOfTime

    for name in options.op or ():
        if name not in tuned():
            print(f"unknown op {name!r}; known: {', '.join(tuned())}", file=sys.stderr)
            return 2
    if options.apply:
        return apply(options.out or RESULTS)
    if not options.rehearse and not torch.cuda.is_available():
        print(f"No GPU that PyTorch can use, so nothing was tuned; with one, this tunes: {', '.join(tuned())}.")
        return 0
    session = open_session(options, torch.device("cpu" if options.rehearse else "cuda"))
    session.show(f"record: {session.store.path.parent / 'tuning'}")
    try:
        found = run(session, tuple(options.op or ()), session.clock.left() / 60, options.fresh)
    except OutOfTime:
        session.show("the time is over; start again to go on")
        return 0
    except DeviceLost as error:
        print(f"the device is lost: {error}; start again to go on behind it", file=sys.stderr)
        return 1
    return int(found["wrong"] + found["lost"] > 0)


def apply(results: Path) -> int:
    """Write the table of every record in a folder of results."""
    from bench.gpu.tune_record import Record, write_table
    from florence_fast.kernels import configs

    records = sorted((results / "tuning").glob("sm_*.json"))
    if not records:
        print(f"no record in {results / 'tuning'}: python -m bench.gpu.tune writes one, on a GPU", file=sys.stderr)
        return 2
    for path in records:
        table = configs.table_path(int(path.stem.removeprefix("sm_")))
        changed = write_table(table, Record(path).table())
        print(f"{'wrote' if changed else 'nothing new for'} {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
