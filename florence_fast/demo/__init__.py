"""The demo: learn words from images by six artists, then read a seventh, never seen.

``run`` shows what the shipped weights do, trains ``florence_nano`` from nothing with the same engine as
``florence-fast train``, measures it on the held-out artist and writes a folder that explains itself.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from florence_fast.console import console
from florence_fast.data.artists import artists_names, artists_test, artists_train
from florence_fast.demo.curves import draw_curves
from florence_fast.demo.grounds import on_grounds
from florence_fast.demo.plan import Plan, make_plan, measure_speed
from florence_fast.demo.progress import Progress
from florence_fast.demo.recipe import FURTHER, LONG, QUICK, rehearsal
from florence_fast.demo.report import write_report
from florence_fast.demo.sheets import draw_queries, draw_readings
from florence_fast.demo.shipped import show_shipped
from florence_fast.evaluate import retrieval, zero_shot
from florence_fast.evaluate.features import encode_images
from florence_fast.files import write_json
from florence_fast.models import create_model, get_tokenizer
from florence_fast.models.florence import Florence
from florence_fast.precision import resolve_precision
from florence_fast.provenance import provenance
from florence_fast.strict_json import parse_json
from florence_fast.tasks.contrastive import ContrastiveTask
from florence_fast.text_files import read_json, read_lines
from florence_fast.train.engine import Trainer

__all__ = ["run"]

logger = logging.getLogger(__name__)

MODEL = "florence_nano"
PLAN = "plan.json"
BASELINE = Path(__file__).parents[2] / "bench" / "results" / "demo_clip_baseline.json"


def run(
    out: Path,
    *,
    long: bool = False,
    pretrained: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    loss: str = "unicl",
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Show the shipped weights, train, evaluate on the unseen artist, and write the report.

    Args:
        out: folder for ``results.json``, ``curves.png``, ``queries.png``, ``readings.png``, ``report.html``,
            ``plan.json`` (the steps of each stage), ``model/`` (weights and config) and ``training/`` (checkpoints and
            logs).
        long: take the recipe of an hour instead of the one of minutes.
        pretrained: weights to go on from, with a shorter recipe; None trains from nothing.
        minutes: take as many steps as fit, by the speed of this machine; None takes the recipe's own number.
        steps: train this many steps only: a rehearsal of the whole path, whose figures mean nothing.
        loss: "unicl", or "clip" for the comparison in which only an image's own text is right.
        resume: go on with the run in ``out``, by its ``plan.json``; without it an earlier run there is an error.
        seed: of the weights, the data order and the augmentation.
        device: where the network is trained and asked.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileExistsError: ``out`` holds an earlier run and ``resume`` is False.
        ValueError: ``minutes`` is not positive, or ``out`` holds a run of another recipe.

    >>> run(Path("runs/demo"))["zero_shot"]["top1"]
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be a positive number, got {minutes!r}")
    if not resume and any((out / "training" / "checkpoints").glob("step_*.pt")):
        raise FileExistsError(f"{out} holds a run already: resume=True goes on with it, another folder starts anew")
    terminal = console()
    recipe = FURTHER if pretrained else LONG if long else QUICK
    precision = resolve_precision("auto", device)
    config, settings = recipe.run(seed=seed, precision=precision), recipe.task(loss)
    kept = Plan.read(out / PLAN, recipe.name, len(config.stages)) if resume and (out / PLAN).is_file() else None
    shipped = show_shipped(MODEL, device, precision, terminal)
    torch.manual_seed(seed)
    model, tokenizer = create_model(MODEL, pretrained=pretrained, device=device), get_tokenizer(MODEL)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    augment, speed = recipe.augment(model.config), None
    if steps is not None:
        config = rehearsal(config, steps)
    else:
        speed = measure_speed(model, tokenizer, artists_names(), config, settings, augment)
        plan = kept or make_plan(recipe.name, config, speed, minutes)
        config = recipe.run(seed=seed, precision=precision, stages=plan.stages(config.stages))
        plan.write(out / PLAN)
        terminal.print(f"Training from {pretrained or 'nothing'}: {config.total_steps:,} steps of {config.batch_size}.")

    progress = Progress(model, tokenizer, config, speed)
    folder = out / "training"
    task = ContrastiveTask(model, tokenizer, artists_train(), settings, augment=augment)
    trainer = Trainer(task, config, folder, on_interval=progress)
    trained = trainer.run(resume="latest" if resume else None)
    if trained["status"] != "finished":
        logger.info("stopped at step %d of %d; --resume goes on", trained["step"], config.total_steps)
        return trained

    average_(model, start, recipe.keep)
    model.eval()
    model.save_pretrained(out / "model")
    results = {
        "model": MODEL,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": recipe.name,
        "pretrained": pretrained,
        "loss": loss,
        "seconds": trained["seconds"],
        "images_per_second": trained["images_per_second"],
        "steps": trained["step"],
        "images_seen": trained["position"],
        **measure(model, tokenizer, precision),
        "shipped": shipped,
        "clip_baseline": read_baseline(),
        "seed": seed,
        "config": trainer.settings,
        **provenance(),
    }
    write_json(out / "results.json", results)
    draw_curves(out / "curves.png", read_history(trainer.log.results_path))
    encoded = encode_images(model, artists_test(), precision=precision)
    draw_queries(out / "queries.png", model, tokenizer, encoded)
    draw_readings(out / "readings.png", model, tokenizer, encoded, artists_names())
    write_report(out / "report.html", results, out)
    print_summary(results, out)
    return results


def measure(model: Florence, tokenizer: Any, precision: str) -> dict[str, Any]:
    """Measure a model on the unseen artist: "zero_shot", "retrieval" and "grounds"."""
    return {
        "zero_shot": zero_shot(model, tokenizer, artists_test(), artists_names(), precision=precision, progress=True),
        "retrieval": retrieval(model, tokenizer, artists_test(), precision=precision, progress=True),
        "grounds": on_grounds(model, tokenizer, precision=precision),
    }


@torch.no_grad()
def average_(model: torch.nn.Module, others: dict[str, torch.Tensor], share: float) -> None:
    """Move the weights of ``model`` towards ``others``, which get ``share`` of the average."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            weight.lerp_(others[name], share)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the run's records, those of training and those of evaluation, in order."""
    return [parse_json(line, str(path)) for line in read_lines(path)]


def read_baseline() -> dict[str, Any] | None:
    """Read the recorded run with CLIP's loss, or None where the package stands without its repository."""
    if not BASELINE.is_file():
        return None
    recorded = read_json(BASELINE)
    wanted = ("recipe", "zero_shot", "retrieval", "seconds", "steps", "command", "commit", "date")
    return {key: recorded[key] for key in wanted}


def print_summary(results: dict[str, Any], out: Path) -> None:
    """Print the figures that matter and where to look next."""
    found, recalls = results["zero_shot"], results["retrieval"]
    table = Table(title=f"an artist never seen: {found['images']} images against {found['classes']} names")
    for column in ("", "first", "among 5", "among 10"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "name of the image": [found[key] for key in ("top1", "top5", "top10")],
        "image to text": recalls["image_to_text"].values(),
        "text to image": recalls["text_to_image"].values(),
    }
    for name, shares in rows.items():
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    terminal = console()
    terminal.print(table)
    grounds = results["grounds"]
    terminal.print(f"of 40 names: {grounds['white']:.0%} on white, {grounds['mean']:.0%} on other grounds")
    terminal.print(f"trained for {results['seconds']:.0f} s at {results['images_per_second']:.0f} images/s")
    terminal.print(f"look at {out / 'report.html'}; ask with: florence-fast search --pretrained {out / 'model'} ...")
