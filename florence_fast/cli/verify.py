"""``florence-fast verify``: every op against float64 and against its rivals, on the user's own machine."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from florence_fast.cli.outputs import check_out_file
from florence_fast.cli.usage import Device, Seed, pick_device, refusals_as_wrong_usage
from florence_fast.console import console


def command(
    device: Device = None,
    compile: Annotated[bool, typer.Option("--compile", help="Time torch.compile too: a minute more.")] = False,
    no_times: Annotated[bool, typer.Option("--no-times", help="Only check the values.")] = False,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "--json", help="Write every figure to this file, as JSON.")
    ] = None,
) -> None:
    """Check every op here against float64, and time it.

    A result may be twice as far from the float64 reference as the plain computation in the same dtype, a gradient
    three times. The times stand beside eager PyTorch and scaled_dot_product_attention on the same tensors.
    """
    from florence_fast.files import write_json
    from florence_fast.verify import SECONDS, verify

    check_out_file("--out", out)
    with refusals_as_wrong_usage():
        device = pick_device(device)
    terminal = console()
    with terminal.status("starting") as status:
        found = verify(
            device,
            seeds=(seed, seed + 1, seed + 2),
            seconds=0 if no_times else SECONDS,
            compile=compile,
            show=status.update,
        )
    for op in dict.fromkeys(row["op"] for row in found["checks"]):
        terminal.print(checks_table(op, [row for row in found["checks"] if row["op"] == op]))
    for row in {row["reason"]: row for row in found["checks"] if "reason" in row}.values():
        terminal.print(f"{'not run' if row['passed'] is None else 'WRONG'}: {row['reason']}")
    for op in dict.fromkeys(row["op"] for row in found["times"]):
        terminal.print(times_table([row for row in found["times"] if row["op"] == op]))
    terminal.print(f"{found['device']}, torch {found['torch']}, seeds {found['seeds']}: {summary(found)}")
    if out is not None:
        write_json(out, found)
    if not found["passed"]:
        raise typer.Exit(1)


def summary(found: dict[str, Any]) -> str:
    """Say in one line how it went."""
    verdicts = [row["passed"] for row in found["checks"]]
    wrong, skipped = verdicts.count(False), verdicts.count(None)
    ran = len(verdicts) - skipped
    if not ran:
        return "nothing could be run"
    said = f"{ran} checks, all right" if not wrong else f"{wrong} of {ran} checks are WRONG"
    return said + (f", {skipped} not run" if skipped else "")


def checks_table(op: str, rows: list[dict[str, Any]]) -> Table:
    """One line for each case and dtype: the error of the result and of the gradient that is nearest to its limit."""
    table = Table(title=f"{op}: relative error against float64 (of the plain computation)", title_justify="left")
    table.box = None
    for column in ("case", "dtype", "backend", "result", "worst gradient", ""):
        table.add_column(column)
    for row in rows:
        shown = ["", ""]
        if "results" in row:
            result, *gradients = row["results"]
            worst = max(gradients, key=lambda g: (not g["passed"], g["error"] / g["limit"]))
            shown = [_errors(result), f"{worst['name'][1:]} {_errors(worst)}"]
        verdict = {True: "right", False: "WRONG", None: "not run"}[row["passed"]]
        table.add_row(row["case"], row["dtype"], row["backend"] or "", *shown, verdict)
    return table


def _errors(result: dict[str, Any]) -> str:
    return f"{result['error']:.1e} ({result['plain_error']:.1e})"


def times_table(rows: list[dict[str, Any]]) -> Table:
    """The medians of one op: one line for each mode, one column for each implementation."""
    first = rows[0]
    table = Table(
        title=f"{first['op']}, {first['case']}, {first['dtype']}: milliseconds", title_justify="left", box=None
    )
    table.add_column("mode")
    for name in dict.fromkeys(row["implementation"] for row in rows):
        table.add_column(name, justify="right")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        table.add_row(mode, *(f"{row['median'] * 1e3:.3g}" for row in rows if row["mode"] == mode))
    return table
