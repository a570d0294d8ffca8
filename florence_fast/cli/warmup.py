"""``florence-fast warmup``: compile a model's kernels ahead of time."""

from typing import Annotated, Any

import typer
from rich.table import Table

from florence_fast.cli.usage import (
    PRECISION_HELP,
    Device,
    Model,
    one_of,
    pick_device,
    refusals_as_wrong_usage,
    settle_precision,
)
from florence_fast.console import console
from florence_fast.precision import PRECISIONS


def command(
    model: Model = "florence_nano",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            "--dtype",
            callback=one_of(*PRECISIONS),
            help=PRECISION_HELP,
        ),
    ] = "auto",
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", "--img-size", min=4, help="Side of the images.", show_default="the model's"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Images of one batch.")] = 8,
    train: Annotated[bool, typer.Option("--train", help="The backward too.")] = False,
    device: Device = None,
) -> None:
    """Compile a model's kernels ahead of time.

    The model runs once on random images and texts. Compiled kernels stay in Triton's cache on disk for the next
    process. A second call of this command reports how many were cached.
    """
    with refusals_as_wrong_usage():
        device = pick_device(device)
    if not device.startswith("cuda"):
        print(f"Nothing to compile ahead: kernels are compiled for GPUs, and this would run on {device!r}.")
        return
    from florence_fast.models.factory import model_config
    from florence_fast.warmup import warm_up

    with refusals_as_wrong_usage():
        model_config(model)
    precision = settle_precision(precision, device)
    terminal = console()
    with terminal.status(f"running {model}"):
        found = warm_up(model, device, precision=precision, img_size=image_size, batch_size=batch_size, train=train)
    if found["kernels"]:
        terminal.print(kernels_table(found["kernels"]))
    terminal.print(summary(found), soft_wrap=True)


def kernels_table(rows: list[dict[str, Any]]) -> Table:
    """One line for each kernel, its forms together."""
    table = Table(box=None)
    table.add_column("kernel", overflow="fold")
    for column in ("forms", "compiled", "warm", "seconds"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(row["name"] for row in rows):
        forms = [row for row in rows if row["name"] == name]
        warm = sum(row["warm"] for row in forms)
        seconds = sum(row["seconds"] for row in forms)
        table.add_row(name, str(len(forms)), str(len(forms) - warm), str(warm), f"{seconds:.2f}")
    return table


def summary(found: dict[str, Any]) -> str:
    """Say in one line what was compiled, and what that cost."""
    cold = [row["seconds"] for row in found["kernels"] if not row["warm"]]
    warm = len(found["kernels"]) - len(cold)
    if not found["kernels"]:
        said = "no kernel of ours ran"
    elif cold:
        said = f"{len(cold)} kernels compiled in {sum(cold):.1f} s, {warm} were warm"
    else:
        said = f"all {warm} kernels were warm"
    return f"{said}; first run {found['first']:.2f} s, second {found['second']:.3f} s"
