"""The static budget: what the compiled kernels need of a multiprocessor, held against what memory gives it.

    python -m bench.budget [--check] [--full] [--case SUBSTRING] [--json PATH] [--summary PATH] [--charts DIR]

Every case is compiled for sm_80 and sm_90 without a GPU, its loops are read from the machine code, and the clocks of
each unit of a multiprocessor (``bench/budget/sass.py``) for one window and head, tile of logits or row are set beside
the clocks in which memory moves the bytes of that: 18.5 bytes a clock and multiprocessor on an H200, 11.2 on an A100. A
kernel whose busiest unit needs more than that cannot be as fast as memory; where products are what an op is for,
tensor cores must need at least 70% of what binds. In long windows exponentials take longer than memory, at 16 a clock,
and the busiest unit may need 15% more than they. Masked windows are weighted by their share of the map. Two compilers
count: the installed Triton, and Triton 3.6.0 where it lies in .venv/triton-3.6.0 (``make budget`` puts it there).

What this leaves out: latency, and whether enough warps are there to hide it; conflicts between banks of shared
memory; how much of its bandwidth DRAM gives for rows of 64 bytes; the L2 cache, which bounds products of small tiles;
the clock's own changes; what runs once a call and not once a window, tile or row. So it says what cannot be fast, and
never that something is.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.budget.cases import Case, select
from bench.budget.rules import broken_rules, exp2_floor, rows_of, tensor_share, title
from bench.machine import sources
from florence_fast.files import write_text

ROOT = Path(__file__).parents[2]
TRITON_36 = ROOT / ".venv" / "triton-3.6.0"
RESULTS = ROOT / "bench" / "results"
WHAT_DECIDES = ("kernels", "florence_fast/ops", "bench/budget")
SHOWN = (
    *("case", "arch", "machine", "op", "dtype", "head_dim", "safe_dots", "tier", "error", "instructions", "pipes"),
    *("busiest", "memory_floor", "product_floor", "exp2_floor", "clocks", "measured_clocks"),
)
LIMITS_SHOWN = ("of_memory", "of_exp2", "tensor_share")
KERNEL_SHOWN = ("name", "stack", "registers", "shared")
"""What a summary keeps of a row, of its limits, and of its kernels."""

Row = dict[str, Any]


class ChildFailed(RuntimeError):
    """The compiling process ended with an error; the message is what it printed last."""


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a rule is broken, and list each")
    parser.add_argument("--full", action="store_true", help="every case and not only the quick ones")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything that was found")
    parser.add_argument("--summary", type=Path, metavar="PATH", help="write what docs/benchmarks.md shows of it")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="draw budget_a100.png, budget_h200.png and others")
    parser.add_argument("--triton-36", type=Path, default=TRITON_36, metavar="DIR", help="where Triton 3.6.0 lies")
    parser.add_argument("--require-both", action="store_true", help="fail if Triton 3.6.0 is not there")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a rule is broken under --check, 2 if the command is wrong."""
    options = parse(args)
    cases = select("full" if options.full or options.case else "quick", options.case)
    if not cases:
        return _complain(f"no case's name contains {options.case!r}; all: {', '.join(c.name for c in select('full'))}")
    second = options.triton_36 if (options.triton_36 / "triton").is_dir() else None
    if second is None:
        print(f"Triton 3.6.0 is not installed in {_short(options.triton_36)} (make budget)")
        if options.require_both:
            return _complain("--require-both needs it")
    try:
        found = [compile_cases(cases, path) for path in ([None] if second is None else [None, second])]
    except ChildFailed as error:
        print(error, file=sys.stderr)
        return 1
    report = build_report(found, args)
    show(report)
    if options.json is not None:
        write_text(options.json, json.dumps(report) + "\n")
    if options.summary is not None:
        write_text(options.summary, format_summary(report))
    if options.charts is not None:
        from bench.budget.chart import draw

        for path in draw(report["rows"], options.charts):
            print(f"wrote {_short(path)}")
    for line in report["allowed"]:
        print(f"allowed {line}")
    for line in report["broken"]:
        print(f"BROKEN {line}")
    rules = f"{len(report['broken'])} rules are broken" if report["broken"] else "every rule holds"
    allowed = f" but for {len(report['allowed'])} that ALLOWED lists" if report["allowed"] else ""
    print(f"{report['compiles']} kernels compiled in {report['seconds']:.0f} s: {rules}{allowed}")
    return int(options.check and bool(report["broken"]))


def _complain(text: str) -> int:
    print(f"python -m bench.budget: {text}", file=sys.stderr)
    return 2


def _short(path: Path) -> str:
    """The path as seen from the checkout, where it lies inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def compile_cases(cases: list[Case], triton: Path | None) -> dict[str, Any]:
    """Compile the cases in a child process, under the Triton of the folder ``triton`` or else the installed one.

    Raises:
        ChildFailed: it ended with an error.
    """
    from tqdm.auto import tqdm

    # Under the interpreter, which the tests set, nothing can be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        paths = [str(triton.resolve()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    total = sum(len(case.archs) for case in cases)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "aot.json"
        command = [
            sys.executable,
            "-m",
            "bench.budget.aot",
            "--cases",
            ",".join(c.name for c in cases),
            "--out",
            str(out),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        printed = []
        with tqdm(total=total, desc="compiling, Triton " + ("3.6.0" if triton else "installed"), unit="case") as bar:
            for line in process.stdout or ():
                printed.append(line)
                bar.update(line.startswith("done "))
        if process.wait() != 0:
            raise ChildFailed(f"compiling ended with exit code {process.returncode}:\n{''.join(printed[-30:])}")
        return json.loads(out.read_text(encoding="utf-8"))


def build_report(found: list[dict[str, Any]], args: Sequence[str] | None) -> dict[str, Any]:
    """Join what the child processes found; ``rows`` holds those of the installed Triton alone."""
    from florence_fast.provenance import provenance

    rows, *others = [rows_of(compiled) for compiled in found]
    words = ["python", "-m", "bench.budget", *(sys.argv[1:] if args is None else args)]
    report: dict[str, Any] = {
        **provenance(),
        "command": shlex.join(words),
        "triton": [compiled["triton"] for compiled in found],
        "compiles": sum(compiled["compiles"] for compiled in found),
        "seconds": sum(compiled["seconds"] for compiled in found),
        "rows": rows,
        "other_rows": [row for group in others for row in group],
    }
    report["sources"] = sources(WHAT_DECIDES, report["torch"], str(report["triton"]))
    results = measured_rows()
    for row in [*report["rows"], *report["other_rows"]]:
        row["measured_clocks"] = measured(row, results)
    broken = broken_rules(report)
    return report | {"broken": broken, "allowed": [x for x in broken_rules(report, strict=True) if x not in broken]}


def format_summary(report: dict[str, Any]) -> str:
    """Return the JSON of what the page, the charts and the queue of GPUs show: a line for each row."""
    kept = {name: value for name, value in report.items() if name not in ("rows", "other_rows")}
    rows = [
        {name: row[name] for name in SHOWN if name in row}
        | {"limits": {name: row["limits"][name] for name in LIMITS_SHOWN}}
        | {"kernels": [{name: kernel[name] for name in KERNEL_SHOWN} for kernel in row["kernels"]]}
        for row in report["rows"]
    ]
    return json.dumps(kept)[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"


def measured_rows(folder: Path = RESULTS) -> list[Row]:
    """Return what ``bench.gpu`` has measured of our kernels, on every device so far."""
    rows = [row for path in sorted(folder.glob("gpu_*.json")) for row in json.loads(path.read_text("utf-8"))["rows"]]
    return [row for row in rows if row["competitor"] == "ours (triton)" and row.get("measured_clocks")]


def measured(row: Row, results: list[Row]) -> float | None:
    """Return the measured clocks of one unit for the call that ``row`` is about, if there are any."""
    for result in results if row["sizes"] is not None else ():
        same = result["op"] == row["measured_as"] and all(result[name] == row[name] for name in ("arch", "dtype"))
        same &= result["mode"] == row["direction"] and result["sizes"].items() >= row["sizes"].items()
        if same:
            return result["measured_clocks"]
    return None


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=230)
    heads = [
        "case",
        "GPU",
        "Triton",
        "instr",
        *PIPES_SHOWN,
        "regs",
        "stack",
        "smem",
        "memory",
        "product",
        "exp2",
        "binds",
    ]
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    table.title = "instructions of a warp and clocks of a multiprocessor, for one window and head, tile or row"
    for head in [*heads, "of memory", "measured", ""]:
        left = head in ("case", "GPU", "Triton", "binds", "")
        table.add_column(head, justify="left" if left else "right", no_wrap=head in ("case", "of memory"))
    for row in sorted([*report["rows"], *report["other_rows"]], key=lambda row: (row["machine"], row["triton"])):
        table.add_row(*cells(row, report["broken"]))
    console.print(table)


PIPES_SHOWN = ("issue", "fma", "imad", "alu", "mufu", "tensor", "lsu", "shared")


def cells(row: Row, broken: list[str]) -> list[str]:
    """Return one row of the table."""
    kernels = row["kernels"]
    share = f"{row['ratio']:.0%}"
    if row["limits"]["tensor_share"] is not None:
        share = f"tensor {tensor_share(row):.0%}"
    elif row["limits"]["of_exp2"] is not None:
        share = f"exp2 {row['pipes'][row['busiest']] / exp2_floor(row):.0%}"
    verdict = "BROKEN" if any(line.startswith(f"{title(row)}:") for line in broken) else "holds"
    measured = "not yet" if row["measured_clocks"] is None else f"{row['measured_clocks']:,.0f}"
    return [
        *(row["case"], row["machine"], row["triton"], f"{row['instructions']:,.0f}"),
        *(f"{row['pipes'][pipe]:,.0f}" for pipe in PIPES_SHOWN),
        *("/".join(str(kernel[name]) for kernel in kernels) for name in ("registers", "stack")),
        "/".join(f"{kernel['shared'] / 1024:.0f}K" for kernel in kernels),
        *(f"{row['memory_floor']:,.0f}", f"{row['product_floor']:,.0f}"),
        *(f"{row['exp2_floor']:,.0f}", row["binds"], share),
        *(measured, verdict),
    ]


if __name__ == "__main__":
    sys.exit(main())
