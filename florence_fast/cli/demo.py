"""``florence-fast demo``: the whole story in one command."""

from pathlib import Path
from typing import Annotated

import typer

from florence_fast.cli.usage import (
    exit_if_interrupted,
    one_of,
    pick_device,
    refusals_as_wrong_usage,
    refuse_earlier_run,
)


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report, the results and the weights.")] = Path(
        "runs/demo"
    ),
    long: Annotated[bool, typer.Option("--long", help="Train for up to an hour instead of minutes.")] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Train this many steps only: a rehearsal.", show_default="all")
    ] = None,
    loss: Annotated[
        str, typer.Option("--loss", callback=one_of("unicl", "clip"), help="unicl, or clip to compare.")
    ] = "unicl",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the data order, augmentation and weights.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Train on pictures by six artists, then read a seventh.

    florence_nano learns the names of 8,666 pictures and is then asked about those of an artist that it has never
    seen. The folder gets results.json, curves, a report with pictures, and the weights.
    """
    with refusals_as_wrong_usage():
        device = pick_device(device)
    if not resume:
        refuse_earlier_run(out / "training")
    from florence_fast.demo import run

    exit_if_interrupted(run(out, long=long, steps=steps, loss=loss, resume=resume, seed=seed, device=device))
