"""Write the tables of docs/benchmarks.md from results: ``python -m bench.report.page``; ``--check`` only compares.

A table lies between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; nothing else of the page is changed.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.budget.chart import floor, shown
from bench.budget.command import WHAT_DECIDES
from bench.cpu import dropin, releases
from bench.machine import recorded
from bench.report import native_table
from bench.report.anchors import load_anchors
from bench.report.rows import read_devices
from bench.report.tables import cpu_text, page_text
from florence_fast.files import write_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"

DEMO_RUNS = {
    "demo.json": "`make demo`",
    "demo_1090_steps.json": "UniCL, an earlier and longer recipe",
    "demo_clip_baseline.json": "CLIP's loss, that same recipe",
    "demo_long.json": "`make demo-long`, an earlier recipe",
    "demo_further.json": "the shipped weights: from that run's, on random grounds too",
}


def load(name: str) -> dict[str, Any]:
    """Read one recorded result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo_table() -> str:
    """The demo's runs: what they took, and what they reached on the unseen artist."""
    runs = {title: load(name) for name, title in DEMO_RUNS.items()}
    head = [
        "",
        "names",
        "steps",
        "minutes",
        "images/s",
        "top-1",
        "top-5",
        "image to text R@1",
        "text to image R@1",
    ]
    rows = [
        [
            title,
            f"{run['zero_shot']['classes']:,}",
            f"{run['steps']:,}",
            f"{run['seconds'] / 60:.1f}",
            f"{run['images_per_second']:.0f}",
            f"{run['zero_shot']['top1']:.1%}",
            f"{run['zero_shot']['top5']:.1%}",
            f"{run['retrieval']['image_to_text']['r1']:.1%}",
            f"{run['retrieval']['text_to_image']['r1']:.1%}",
        ]
        for title, run in runs.items()
    ]
    machine = load("demo.json")
    return "\n".join(
        [
            f"{machine['zero_shot']['images']:,} images by the unseen artist on white. Minutes and images a second",
            f"are of training; `make demo` ran with {machine['threads']} threads ({machine['device']}) and torch "
            f"{machine['torch']}.",
            "",
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def budget_table() -> str:
    """What the compiled kernels need of a multiprocessor, beside what memory or, in long windows, exp2 takes."""
    budget = load("budget.json")
    rows: dict[str, list[str]] = {}
    for row in budget["rows"]:
        if (row["dtype"], row.get("head_dim")) != ("bf16", 32):
            continue
        stack = max(kernel["stack"] for kernel in row["kernels"])
        measured, least = row["measured_clocks"], floor(row)
        name = "memory" if least == row["memory_floor"] else "exp2"
        part = row["pipes"][row["busiest"]] / least
        rows.setdefault(row["case"].replace(" d32 bf16", ""), []).append(
            f"{row['instructions']:,.0f} | {name} {least:,.0f} | {UNITS[row['busiest']]} {part:.0%} "
            f"| {stack} | {'not yet' if measured is None else f'{measured:,.0f}'}"
        )
    machines = ("A100", "H200")
    head = [f"{machine}: {name}" for machine in machines for name in COLUMNS]
    absent = " | ".join("-" * len(COLUMNS))
    return "\n".join(
        [
            f"bf16, head dim 32, one window and head, Triton {' and '.join(budget['triton'])} "
            f"(the table shows the first). {budget['compiles']} kernels were compiled for it; "
            f"{recorded([{'sources': None} | budget], WHAT_DECIDES)}.",
            "",
            "| window | " + " | ".join(head) + " |",
            "|---|" + "---:|" * len(head),
            *(
                f"| {case} | {' | '.join([absent] * (len(machines) - len(cells)) + cells)} |"
                for case, cells in rows.items()
            ),
        ]
    )


def budget_ops_table() -> str:
    """What the kernels of the other ops need of a multiprocessor, beside what memory and their products take."""
    budget = load("budget.json")
    rows: dict[str, list[str]] = {}
    for row in budget["rows"]:
        if row["op"] == "window_attention" or not shown(row):
            continue
        floors = {"memory": row["memory_floor"], "tensor": row["product_floor"]}
        bound = max(floors, key=floors.__getitem__)
        stack = max(kernel["stack"] for kernel in row["kernels"])
        measured = row["measured_clocks"]
        rows.setdefault(row["case"].replace(" bf16", ""), []).append(
            f"{UNITS[bound]} {floors[bound]:,.0f} | {UNITS[row['busiest']]} {row['pipes'][row['busiest']]:,.0f}, "
            f"{row['pipes'][row['busiest']] / floors[bound]:.0%} | {stack} "
            f"| {'not yet' if measured is None else f'{measured:,.0f}'}"
        )
    head = [f"{machine}: {name}" for machine in ("A100", "H200") for name in OPS_COLUMNS]
    return "\n".join(
        [
            "bf16; one row, one sample of deform_conv2d, or one tile of 128 x 128 logits of the contrastive loss, "
            f"Triton {budget['triton'][0]}. What the op cannot but need stands first, the busiest unit as part of it.",
            "",
            "| op | " + " | ".join(head) + " |",
            "|---|" + "---:|" * len(head),
            *(f"| {case} | {' | '.join(cells)} |" for case, cells in rows.items()),
        ]
    )


def gpu_table() -> str:
    """What was measured on GPUs, and how our goals stand."""
    return page_text(read_devices(RESULTS), load_anchors())


def cpu_table() -> str:
    """What was measured on processors."""
    return cpu_text(read_devices(RESULTS))


def cpu_native_table() -> str:
    """The goals of the native CPU backend, and what was measured."""
    return native_table.page_text(native_table.read_all(RESULTS))


def dropin_table() -> str:
    """What ``ff.accelerate`` does to the models of other libraries."""
    return dropin.page_text(RESULTS)


def compat_table() -> str:
    """Which releases of other libraries were tested."""
    return releases.page_text(RESULTS)


OPS_COLUMNS = ("the floor, clocks", "busiest unit, clocks", "stack, bytes", "measured, clocks")
COLUMNS = ("instructions a warp", "the floor, clocks", "busiest unit of that", "stack, bytes", "measured, clocks")
UNITS = {
    "issue": "issue",
    "fma": "float32",
    "alu": "integer",
    "mufu": "exp2",
    "tensor": "tensor",
    "lsu": "load/store",
    "shared": "shared memory",
    "memory": "memory",
}
TABLES = {
    "demo": demo_table,
    "budget": budget_table,
    "budget_ops": budget_ops_table,
    "gpu": gpu_table,
    "cpu": cpu_table,
    "cpu_native": cpu_native_table,
    "dropin": dropin_table,
    "compat": compat_table,
}


def fill(text: str) -> str:
    """Return the page's ``text`` with every table replaced by its present content.

    Raises:
        ValueError: a table's markers are missing.
    """
    for name, build in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"docs/benchmarks.md must hold <!-- {name}:begin --> and <!-- {name}:end -->")
        content = build()
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def write() -> Path:
    """Write the page anew from the recorded results; return its path."""
    return write_text(PAGE, fill(PAGE.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the page differs from the results")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = fill(before)
    if not check:
        write_text(PAGE, after)
    elif before != after:
        print("docs/benchmarks.md differs from bench/results: run python -m bench.report.page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
