"""Which library computes each product of a Swin fastest: ``python -m bench.cpu.products`` from the checkout.

The three products of every layer of a Swin, y = x w^T + b, dx = dy w and dw = dy^T x, by what PyTorch takes (MKL on
x86), by oneDNN and by our own kernel, in turns. `florence_fast.ops._product` holds the rule that follows from it for
each kind of processor. ``--out FILE`` keeps the figures.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.cpu.rows.base import CPU
from bench.machine import facts
from bench.report.tables import Sheet, milliseconds
from florence_fast.files import write_json
from florence_fast.ops import _product
from florence_fast.timing import time_calls

PRODUCTS = ("y", "dx", "dw")


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.products", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=96, help="channels of the first stage: 96 is Swin-T, 128 Swin-B")
    parser.add_argument("--batch-size", type=int, default=8, help="images of 224 px (8)")
    parser.add_argument("--turns", type=int, default=7, help="repetitions of each (7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse(args)
    rows = []
    for size in swin_products(options.width, options.batch_size):
        rows.append({"size": size} | measure(*size, options.turns))
        print(f"  {_name(size)}", file=sys.stderr)
    found = facts(CPU) | {"threads": torch.get_num_threads(), "width": options.width, "batch_size": options.batch_size}
    if options.out:
        write_json(options.out, {"machine": found, "rows": rows})
    print(sheet(rows).markdown())
    print(f"\n{json.dumps(found)}\nthe rule here: {_product.library(torch.float32)}")
    return 0


def swin_products(width: int, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """Give rows, channels in and channels out of the layers of a Swin's block of each stage, and of its merges."""
    for stage in range(4):
        rows, channels = batch_size * (56 >> stage) ** 2, width << stage
        yield rows, channels, 3 * channels
        yield rows, channels, channels
        yield rows, channels, 4 * channels
        yield rows, 4 * channels, channels
        if stage < 3:
            yield rows // 4, 4 * channels, 2 * channels


def measure(rows: int, wide_in: int, wide_out: int, turns: int) -> dict[str, Any]:
    """Return seconds by product and library."""
    x, weight, bias = torch.randn(rows, wide_in), torch.randn(wide_out, wide_in), torch.randn(wide_out)
    grad = torch.randn(rows, wide_out)
    y, dx, dw = torch.empty(rows, wide_out), torch.empty(rows, wide_in), torch.empty(wide_out, wide_in)
    calls: dict[str, Callable[[], Any]] = {
        "y plain": lambda: torch.addmm(bias, x, weight.T, out=y),
        "y oneDNN": lambda: _product._onednn(x, weight, bias),
        "y native": lambda: _product._native(x, weight.T, bias, y),
        "dx plain": lambda: torch.mm(grad, weight, out=dx),
        "dx oneDNN": lambda: _product._onednn(grad, weight.T, None),
        "dx native": lambda: _product._native(grad, weight, None, dx),
        "dw plain": lambda: torch.mm(grad.T, x, out=dw),
        "dw oneDNN": lambda: _product.weight_by_onednn(grad, x),
        "dw native": lambda: _product._native(grad.T, x, None, dw),
    }
    timings = time_calls({name: [call] for name, call in calls.items()}, CPU, 0.0, turns)
    return {name: timing.median for name, timing in timings.items()}


def sheet(rows: list[dict[str, Any]]) -> Sheet:
    """Return the table; its last line has the sums."""
    names = [f"{product} {library}" for product in PRODUCTS for library in ("plain", "oneDNN", "native")]
    lines = [[_name(row["size"]), *(milliseconds(row[name]) for name in names)] for row in rows]
    lines.append(["all", *(milliseconds(sum(row[name] for row in rows)) for name in names)])
    return Sheet("products", ["rows, in -> out", *(f"{name}, ms" for name in names)], lines)


def _name(size: tuple[int, int, int]) -> str:
    rows, wide_in, wide_out = size
    return f"{rows:,}, {wide_in} -> {wide_out}"


if __name__ == "__main__":
    sys.exit(main())
