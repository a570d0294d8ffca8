"""``florence-fast profile``: a model's time by range, op and kernel, and the commands for Nsight."""

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from florence_fast.cli.outputs import check_out_file, check_out_folder
from florence_fast.cli.usage import (
    BatchSize,
    Device,
    Model,
    Precision,
    Seed,
    WrongUsage,
    pick_device,
    refusals_as_wrong_usage,
    settle_precision,
)
from florence_fast.console import console

_SAY_WHAT = ("model", "batch_size", "image_size", "precision", "micro_batch_size", "steps", "warmup", "seed", "device")


def command(
    context: typer.Context,
    model: Model = "florence_nano",
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Side of the images.", show_default="the model's")
    ] = None,
    batch_size: BatchSize = 8,
    precision: Precision = "auto",
    train: Annotated[bool, typer.Option("--train", help="A contrastive step: forward, backward, AdamW.")] = False,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", min=1, help="With --train: pairs at a time (gradient cache).")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 2,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of summary.json and ranges.png.")] = Path("runs/profile"),
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a Chrome trace to this file.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of each table.")] = 15,
    nsys: Annotated[bool, typer.Option("--nsys", help="Print the nsys command, and run it if nsys is here.")] = False,
    ncu: Annotated[
        str | None,
        typer.Option("--ncu", metavar="KERNEL", help="The same for ncu and the kernel that this pattern matches."),
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Only run, with NVTX ranges: what nsys and ncu watch.")] = False,
) -> None:
    """Show where a model's time goes.

    A few warm steps on random images and texts run under torch.profiler. docs/profiling.md explains the names of
    the ranges, and what to look at in Nsight.
    """
    if nsys + bare + (ncu is not None) > 1:
        raise WrongUsage("--nsys, --ncu and --bare are three ways to run: give one of them")
    check_out_folder("--out", out)
    check_out_file("--trace", trace)
    if nsys or ncu is not None:
        _run_nsight(out, _options(context), device, ncu)
        return

    from florence_fast.profile.workload import Workload, check

    with refusals_as_wrong_usage():
        device = pick_device(device)
    workload = Workload(model, batch_size, image_size, precision, train, micro_batch_size, seed)
    with refusals_as_wrong_usage():
        check(workload)
    if bare:
        _run_bare(workload, device, steps, warmup)
        return
    workload = replace(workload, precision=settle_precision(precision, device))

    from florence_fast.files import write_json
    from florence_fast.profile import profile
    from florence_fast.profile.chart import draw_ranges

    terminal = console()
    with terminal.status("starting") as status:
        found = profile(workload, device, steps=steps, warmup=warmup, trace=trace, show=status.update)
    draw_ranges(out / "ranges.png", found)
    write_json(out / "summary.json", found)
    of = "kernels" if found["time"] == "kernels" else "CPU time"
    terminal.print(rows_table(f"ranges: milliseconds of {of} a step", found["ranges"][:top]))
    terminal.print(rows_table(f"ops: milliseconds of {of} a step", found["ops"][:top]))
    if found["kernels"]:
        terminal.print(rows_table("kernels: milliseconds a step", found["kernels"][:top]))
    terminal.print(summary(found))
    terminal.print(f"{out / 'summary.json'}, {out / 'ranges.png'}" + (f", {trace}" if trace else ""), soft_wrap=True)


def summary(found: dict[str, Any]) -> str:
    """Say in one line how long a step took, and what the profiler cost."""
    plain, watched = found["step_ms"]["without_profiler"], found["step_ms"]["under_profiler"]
    pace = found["workload"]["batch_size"] / plain * 1e3
    return (
        f"{found['device']}, torch {found['torch']}: {plain:.3g} ms a step, {pace:.3g} images/s; "
        f"{watched:.3g} ms under the profiler"
    )


def rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One line for each range, op or kernel."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("name", overflow="fold")
    for column in ("calls", "total", "own", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        times = (f"{row['total_ms']:.3f}", f"{row['self_ms']:.3f}")
        table.add_row(row["name"], f"{row['calls']:g}", *times, f"{100 * row['share']:.1f}%")
    return table


def _options(context: typer.Context) -> list[str]:
    """The options that say what is run, as words; a device that was not named is the GPU."""
    given = {"device": "cuda", **{name: value for name, value in context.params.items() if value is not None}}
    words = []
    for name in _SAY_WHAT:
        if name in given:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    return words + ["--train"] * given["train"]


def _run_nsight(out: Path, options: list[str], device: str | None, kernel: str | None) -> None:
    """Print the command of nsys, or of ncu for ``kernel``, and run it where it is installed."""
    from florence_fast.profile.nsight import ncu_command, nsys_command

    if device is not None and not device.startswith("cuda"):
        raise WrongUsage(f"--nsys and --ncu look at a GPU, not at {device!r}")
    words = nsys_command(out, options) if kernel is None else ncu_command(out, options, kernel)
    print(shlex.join(words), flush=True)
    if shutil.which(words[0]) is None:
        print(f"{words[0]} is not installed here: run this where it is, with a GPU")
        return
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(words, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _run_bare(workload: Any, device: str, steps: int, warmup: int) -> None:
    from florence_fast.profile import run_bare
    from florence_fast.ranges import find_nvtx

    with refusals_as_wrong_usage():
        find_nvtx()
    workload = replace(workload, precision=settle_precision(workload.precision, device))
    print(f"{run_bare(workload, device, steps=steps, warmup=warmup):.3g} ms a step, with NVTX ranges")
