"""List what waits for a GPU: ``python -m bench.gpu.queue`` writes GPU_QUEUE.md.

From the stages, the stored rows, and the static budget, which says what a multiprocessor needs for a unit of an op.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.gpu.stages import DTYPES, ops, stages
from bench.report.rows import Device, read_devices
from bench.session import OpBench, dtypes_of, modes_of

QUEUE = Path(__file__).parents[1] / "GPU_QUEUE.md"
RESULTS = Path(__file__).parents[1] / "results"
ARCHS = {80: "A100", 90: "H100, H200"}
HEAD = """# What waits for a GPU

`python -m bench.gpu.queue` writes this file. One command measures all that this repository has to measure on a GPU:

```bash
make gpu        # python -m bench.gpu from the checkout: it installs nothing and needs PyTorch and Triton
```

It stops after nine minutes, between two rows, and goes on where it stopped at its next start. Every row is in
`results/gpu_<device>.json` as soon as it is made. What is done first is worth most: every op in the dtype that models
run in, then the other dtypes.
"""
MIDDLE = """
A competitor is compared with float64 before it is timed; one that is too far off gets no time, and one that is not
installed is a row with that reason. `make test` runs all of it on the CPU with tiny shapes
(`python -m bench.gpu --rehearse`), our kernels through Triton's interpreter. Flags for short slots and for the whole
night: `python -m bench.gpu --help`.

## What the static budget says of them

Clocks of one multiprocessor for one unit of an op (a window and head, a tile of logits, a row), if nothing but the
busiest of its pipes or memory counted: a measured figure is larger. Sizes whose code the budget does not hold whole
are not here; a figure goes from here once our kernels have a time at that size on such a GPU.
"""

Predicted = dict[tuple[str, int], float]


def queue(results: Path = RESULTS) -> str:
    """Return the text of GPU_QUEUE.md.

    Raises:
        ValueError: a file of results does not hold what it should.
    """
    devices = [device for device in read_devices(results) if device.is_gpu]
    lines = [f"| {stage.name} | {stage.what} | {state(stage.name, devices)} |" for stage in stages()]
    table = ["", "| stage | what it does | measured |", "|---|---|---|", *lines]
    heads = ["op", "size", "dtype", "mode", "units", *ARCHS.values()]
    predicted = ["", f"| {' | '.join(heads)} |", "|---|---|---|---" + "|---:" * (1 + len(ARCHS)) + "|"]
    predicted += [f"| {' | '.join(cells)} |" for cells in waiting(devices, read_budget(results / "budget.json"))]
    return "\n".join([HEAD.rstrip(), *table, MIDDLE.rstrip(), *predicted]) + "\n"


def state(stage: str, devices: list[Device]) -> str:
    """Say how far a stage has come on each GPU."""
    found = []
    for device in devices:
        rows = [row for row in device.rows if row.get("stage") == stage]
        ended = device.stages.get(stage, {}).get("status")
        if rows:
            found.append(f"{device.name}: {sum(row['status'] == 'timed' for row in rows)} of {len(rows)} rows")
        elif ended is not None:
            found.append(f"{device.name}: {ended}")
    return "; ".join(found) or "no"


def waiting(devices: list[Device], budget: Predicted) -> list[list[str]]:
    """Return the cells of a line for each size that the budget predicts and a GPU has not measured."""
    timed = {
        (row["op"], row["shape"], row["dtype"], row["mode"], row.get("arch"))
        for device in devices
        for row in device.timed()
        if row["competitor"] == "ours (triton)"
    }
    lines = []
    for op in ops():
        for name, shape in op.SHAPES.items():
            dtype = dtypes_of(op, shape, DTYPES)[0]
            for mode in (mode for mode in modes_of(op) if mode != "backward"):
                clocks = {arch: prediction(op, shape, dtype, mode, arch, budget) for arch in ARCHS}
                open_now = {a: c for a, c in clocks.items() if c and (op.OP, name, dtype, mode, a) not in timed}
                if open_now:
                    figures = [f"{open_now[arch]:,.0f}" if arch in open_now else "" for arch in ARCHS]
                    lines.append([op.OP, name, dtype, mode, f"{op.units(shape):,}", *figures])
    return lines


def prediction(op: OpBench, shape: Any, dtype: str, mode: str, arch: int, budget: Predicted) -> float | None:
    """Return the clocks of a unit, or None where the budget lacks one of the cases that make it."""
    found = [budget.get((case, arch)) for case in op.budget_cases(shape, dtype, mode)]
    return sum(found) if found and None not in found else None


def read_budget(path: Path) -> Predicted:
    """Return the clocks of each case and architecture.

    Raises:
        ValueError: the file holds no budget.
    """
    if not path.is_file():
        return {}
    found: Predicted = {}
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            key = row["case"], row["arch"]
            found[key] = found.get(key, 0.0) + float(row["clocks"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold a static budget, got {type(error).__name__}: {error}") from error
    return found


def main(args: list[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.queue", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    parser.add_argument("--out", type=Path, default=QUEUE, help="the file to write (bench/GPU_QUEUE.md)")
    options = parser.parse_args(args)
    options.out.write_text(queue(options.results), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
