"""``florence-fast demo``: train on six artists and test on a seventh, in one command."""

import math
from pathlib import Path
from typing import Annotated

import typer

from florence_fast.cli.outputs import check_out_folder
from florence_fast.cli.usage import (
    Device,
    Seed,
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
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            min=0.1,
            help="Train as many steps as fit into this time on this machine.",
            show_default="the recipe's steps",
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option("--pretrained", help="Go on from weights; 'artists' are the shipped ones.", show_default="none"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Train this many steps only: a rehearsal.", show_default="all")
    ] = None,
    loss: Annotated[
        str, typer.Option("--loss", callback=one_of("unicl", "clip"), help="unicl, or clip to compare.")
    ] = "unicl",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train on images by six artists, then test on a seventh.

    The demo first evaluates the shipped weights. It then trains florence_nano on the names of 8,666 images and tests
    it on an artist that it has never seen. The folder gets results.json, curves, a report with images, and the weights.
    """
    from florence_fast.models.pretrained import find_pretrained

    check_out_folder("--out", out)
    with refusals_as_wrong_usage():
        device = pick_device(device)
        if minutes is not None and (steps is not None or not math.isfinite(minutes)):
            raise ValueError(f"--minutes must be a finite number, without --steps, got {minutes} and {steps} steps")
        if long and pretrained:
            raise ValueError("--long trains from nothing and --pretrained goes on from weights: give one of them")
        if pretrained:
            find_pretrained("florence_nano", pretrained)
    if not resume:
        refuse_earlier_run(out / "training")
    from florence_fast.demo import run

    settings = {"long": long, "pretrained": pretrained, "minutes": minutes, "steps": steps, "loss": loss, "seed": seed}
    exit_if_interrupted(run(out, resume=resume, device=device, **settings))
