"""What one line does to the Swin of another library: ``python -m bench.cpu.dropin`` from the checkout.

For each model of ``dropin_models``, before and after ``ff.accelerate`` and, unless ``--quick``, under torch.compile:
which layers were swapped, how far the results are apart, and how long a pass of inference takes and, in fp32, a forward
and backward, all taking turns in one process. Weights are random. Where the processor has no bf16 units, a bf16 row is
of one image, and the model as it was runs once. Where `florence_fast.ops._product` takes oneDNN or our own kernel in
fp32, the same is measured with PyTorch's products, MKL's, so that the gain of the products stands apart. The exit code
is 1 if a result is further from the unaccelerated one than its bound.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.cpu.dropin_models import CASES, Case
from bench.cpu.rows.base import CPU
from bench.machine import Clock, facts, recorded, sources, where
from bench.report.tables import Sheet, milliseconds
from bench.store import Row, Store
from florence_fast import compat, native, processor
from florence_fast.files import replacing
from florence_fast.ops import _product
from florence_fast.timing import time_calls

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"
WHAT_DECIDES = (
    "csrc",
    "florence_fast/native.py",
    "florence_fast/ops",
    "florence_fast/compat",
    "bench/cpu/dropin_models.py",
)
COLOURS = {"fp32": "#4c78a8", "bf16": "#54a24b"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEFORE, AFTER, COMPILED = "before", "after", "torch.compile"
PLAIN = "after, MKL's products"
TRAIN_BEFORE, TRAIN_AFTER = "training, before", "training, after"
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-5, 2.0
"""Of the error relative to the norm; in bf16 of our error against float32 over that of the model as it was."""
HEAD = [
    *("model", "dtype", "layers swapped", "error", "bound", "ms, before", "ms, after", "times", "ms, torch.compile"),
    *("times, with MKL's products", "times, forward and backward"),
]
SAME_PRODUCTS = "the same"
"""Where MKL's products are what `accelerate` takes."""


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.dropin", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="begin no model after this time (15)")
    parser.add_argument("--turns", type=int, default=9, help="repetitions of each (9)")
    parser.add_argument("--quick", action="store_true", help="without torch.compile, which takes a minute a model")
    parser.add_argument("--only", action="append", metavar="TEXT", help="models whose name holds this")
    parser.add_argument("--rehearse", action="store_true", help="small inputs, stored in a passing folder")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results); the chart then lies there")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    """Run the command."""
    options = parse(args)
    folder = options.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    level = native.level() if native.levels() else "torch"
    found = facts(CPU) | {"level": level, "threads": torch.get_num_threads(), "sources": sources(WHAT_DECIDES)}
    found |= {"processor": processor.name(), "products": _product.library(torch.float32)}
    store, clock = Store(folder / f"dropin-{level}.json", found["sources"]), Clock(options.minutes)
    for name, case in CASES.items():
        if options.only and not any(text.lower() in name.lower() for text in options.only):
            continue
        for dtype in DTYPES:
            key = f"{name}|{dtype}"
            if clock.left() <= 0 or store.finished(key):
                continue
            row = {"key": key, "stage": "dropin", "model": name, "dtype": dtype} | _row(case, dtype, options) | found
            store.put(row)
            print(f"  {name}, {dtype}: {_outcome(row)}", flush=True)
    rows = list(store.rows.values())
    print(f"\n{sheet(rows).markdown()}\n\ndrawn: {draw(rows, DOCS if folder == RESULTS else folder)}")
    if folder == RESULTS:
        from bench.report import page  # which writes this table, too

        page.write()
    return int(any(row["status"] == "error" or not row.get("within", True) for row in rows))


def _row(case: Case, dtype: str, options: argparse.Namespace) -> Row:
    """Build a model, accelerate a copy, compare and time them."""
    torch.manual_seed(0)
    slow = dtype == "bf16" and not processor.units("bf16").fast
    batch = 1 if options.rehearse or slow else case.batch
    try:
        model, inputs = case.build(batch, case.tiny if options.rehearse else case.size)
        _wake(model)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return {"status": "missing", "reason": f"{type(error).__name__}: {error}"[:200]}
    try:
        found = _compare(case, model.eval(), inputs, dtype, options, slow)
        return found | {"batch": batch, "once": slow}
    except Exception as error:  # one model that fails must not end the others
        return {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}


def _compare(
    case: Case, model: nn.Module, inputs: dict[str, Tensor], dtype: str, options: argparse.Namespace, slow: bool
) -> Row:
    exact = _infer(model, inputs, case)()
    before = model.to(DTYPES[dtype])
    after = copy.deepcopy(before)
    report = compat.accelerate(after, verbose=False)
    cast = {name: x.to(DTYPES[dtype]) if x.is_floating_point() else x for name, x in inputs.items()}
    calls = {BEFORE: _infer(before, cast, case), AFTER: _infer(after, cast, case)}
    results, once = {}, {}
    for name, call in calls.items():
        began = time.perf_counter()
        results[name] = call().double()
        once[name] = time.perf_counter() - began
    if dtype == "fp32":
        error, bound = _distance(results[AFTER], results[BEFORE]), FLOAT32_BOUND
    else:
        usual = _distance(results[BEFORE], exact)
        error, bound = _distance(results[AFTER], exact) / max(usual, 1e-12), BFLOAT16_BOUND
    if dtype == "fp32":
        calls |= {TRAIN_BEFORE: _train(before, cast, case), TRAIN_AFTER: _train(after, cast, case)}
        if _product.library(torch.float32) != "plain":
            calls[PLAIN] = _with_plain_products(calls[AFTER])
    if slow:  # the model as it was takes minutes a pass: the one for the error has to do
        calls.pop(BEFORE)
    elif not (options.quick or options.rehearse):
        calls[COMPILED] = _infer(torch.compile(before, dynamic=False), cast, case)
    seconds, turns = (0.0, 2) if options.rehearse else (0.5, options.turns)
    times = time_calls({name: [call] for name, call in calls.items()}, CPU, seconds, least_turns=turns)
    return {
        "status": "timed",
        "swapped": {kind: len(names) for kind, names in report.swapped.items()},
        "skipped": report.skipped,
        "error": error,
        "bound": bound,
        "within": error <= bound,
        "times": once | {name: found.median for name, found in times.items()},
        "turns": turns,
    }


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Draw what an initialisation leaves at one number: Swin V2 begins with branches that add nothing."""
    for parameter in model.parameters():
        if parameter.ndim and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def _infer(model: nn.Module, inputs: dict[str, Tensor], case: Case) -> Any:
    def infer() -> Tensor:
        with torch.inference_mode():
            return case.read(model(**inputs))

    return infer


def _train(model: nn.Module, inputs: dict[str, Tensor], case: Case) -> Any:
    def train() -> None:
        model.zero_grad()
        case.read(model(**inputs)).square().mean().backward()

    return train


def _with_plain_products(call: Any) -> Any:
    """Return the call with PyTorch's float32 products."""

    def plain() -> Tensor:
        with mock.patch.object(_product, "library", lambda dtype: "plain"):
            return call()

    return plain


def _distance(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def _outcome(row: Row) -> str:
    if row["status"] != "timed":
        return f"{row['status']}: {row['reason']}"
    times = row["times"]
    return f"{times[BEFORE] * 1e3:.1f} -> {times[AFTER] * 1e3:.1f} ms, error {row['error']:.2g} of {row['bound']:g}"


def sheet(rows: list[Row]) -> Sheet:
    """Return the table: a line for each model and dtype that could be measured."""
    lines = []
    for row in (row for row in rows if row["status"] == "timed"):
        times = row["times"]
        compiled = milliseconds(times[COMPILED]) if COMPILED in times else ""
        error = f"{row['error']:.1e}" if row["dtype"] == "fp32" else f"{row['error']:.2f}x"
        bound = f"{row['bound']:.0e}" if row["dtype"] == "fp32" else f"{row['bound']:g}x"
        figures = [milliseconds(times[BEFORE]), milliseconds(times[AFTER]), f"{times[BEFORE] / times[AFTER]:.2f}x"]
        count = str(sum(row["swapped"].values()))
        plain = _times(times, BEFORE, PLAIN)
        if row["dtype"] == "fp32" and not row.get("onednn", row.get("products") != "plain"):
            plain = SAME_PRODUCTS
        training = _times(times, TRAIN_BEFORE, TRAIN_AFTER)
        dtype = row["dtype"] + (", one image, before: once" if row.get("once") else "")
        lines.append([row["model"], dtype, count, error, bound, *figures, compiled, plain, training])
    return Sheet(_machine(rows[0]) if rows else "nothing measured", HEAD, lines)


def _times(times: dict[str, float], before: str, after: str) -> str:
    return f"{times[before] / times[after]:.2f}x" if after in times else ""


def page_text(folder: Path) -> str:
    """Return what docs/benchmarks.md shows: a table for each instruction set that was measured."""
    parts = []
    for path in sorted(folder.glob("dropin-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        chart = f"![How many times as fast each model is]({_chart(rows)})"
        parts += [
            f"{_machine(rows[0])}; medians of turns, `{path.name}`; {recorded(rows, WHAT_DECIDES)}.",
            sheet(rows).markdown(),
            chart,
        ]
    return "\n\n".join(parts) or "Not measured yet."


def _chart(rows: list[Row]) -> str:
    return f"dropin_{rows[0]['level'] if rows else 'none'}.png"


def _machine(row: Row) -> str:
    return f"{where(row)}, level {row['level']}, {row['threads']} threads, torch {row['torch']}"


def draw(rows: list[Row], folder: Path) -> Path:
    """Draw a bar for each model and dtype: how many times as fast it is after the line as before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    timed = [row for row in rows if row["status"] == "timed"]
    path = folder / _chart(rows)
    whole, axes = plt.subplots(figsize=(9, 1.4 + 0.28 * max(len(timed), 1)), dpi=100, layout="constrained")
    for place, row in enumerate(timed):
        times = row["times"]
        ratio = times[BEFORE] / times[AFTER]
        axes.barh(place, ratio - 1, 0.7, left=1, color=COLOURS[row["dtype"]])
        axes.annotate(f"{ratio:.2f}", (ratio, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
        if COMPILED in times:
            axes.plot(times[BEFORE] / times[COMPILED], place, "d", color="#333333", markersize=4)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(timed)), [f"{row['model']}, {row['dtype']}" for row in timed], fontsize=7)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xscale("log")  # without bf16 units some models are 100 times as fast as before, others 1.2 times
    ticks = [ratio for ratio in (0.5, 1, 1.35, 2, 5, 10, 20, 50, 100) if ratio <= 2 * axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("times as fast as before", fontsize=8)
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=f"ff.accelerate, {dtype}") for dtype, colour in COLOURS.items()
    ]
    if any(COMPILED in row["times"] for row in timed):
        label = "torch.compile, compiled"
        handles.append(Line2D([], [], linestyle="", marker="d", color="#333333", markersize=5, label=label))
    whole.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        whole.savefig(beside, format="png")
    plt.close(whole)
    return path


if __name__ == "__main__":
    sys.exit(main())
