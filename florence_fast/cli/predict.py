"""``florence-fast predict``: rank texts by how well they describe an image."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from florence_fast.cli.outputs import check_out_file
from florence_fast.cli.usage import (
    DEFAULT_MODEL,
    Device,
    ModelOfWeights,
    Precision,
    Pretrained,
    ResizeMode,
    load,
    pick_device,
    refusals_as_wrong_usage,
    settle_precision,
    weights_of,
)
from florence_fast.console import console
from florence_fast.files import write_json
from florence_fast.printable import printable

SHOWN = 5  # classes


def command(
    image: Annotated[Path, typer.Option("--image", help="The image.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--texts",
            metavar="TEXT...",
            help="The texts to choose from; a run of `train classification` needs none.",
        ),
    ] = None,
    more_texts: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    template: Annotated[str, typer.Option("--template", help="The prompt; {} stands for the text.")] = "{}",
    model: ModelOfWeights = None,
    pretrained: Pretrained = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the answer here, as JSON.")] = None,
    image_resize_mode: ResizeMode = None,
    precision: Precision = "auto",
    device: Device = None,
) -> None:
    """Rank several texts, or a model's classes, for an image."""
    from florence_fast.data.images import open_image
    from florence_fast.data.prompts import fill
    from florence_fast.evaluate import probabilities
    from florence_fast.evaluate.features import device_of

    # The parser gives --texts one value only; those that follow it arrive as arguments.
    texts = [*(texts or []), *(more_texts or [])]
    check_out_file("--out", out)
    if not texts:
        _classify(image, pretrained or model, out, precision, device)
        return
    with refusals_as_wrong_usage():
        asked = [fill(template, text) for text in texts]
        shown = open_image(image)
    model, pretrained = weights_of(model, pretrained, note=True)
    net, tokenizer = load(model, pretrained, device, precision, image_resize_mode)
    precision = settle_precision(precision, device_of(net))
    answer = probabilities(net, tokenizer, shown, asked, precision=precision)

    ranked = sorted(zip(texts, answer, strict=True), key=lambda pair: -pair[1])
    _show(image, "text", ranked)
    if out is not None:
        answers = [{"text": text, "probability": probability} for text, probability in ranked]
        write_json(out, {"image": str(image), "model": model, "pretrained": pretrained, "answers": answers})


def _classify(image: Path, weights: str | None, out: Path | None, precision: str, device: str | None) -> None:
    """Say which of its classes a classifier sees, the likeliest first."""
    from florence_fast.data.images import open_image
    from florence_fast.evaluate.classification import class_probabilities
    from florence_fast.models.classifier import load_classifier
    from florence_fast.models.factory import local_path
    from florence_fast.models.reading import read_config

    with refusals_as_wrong_usage():
        path = local_path(weights or DEFAULT_MODEL)
        if weights is None or path is None or "text" in (read_config(path) or ()):
            raise ValueError(f"--texts is needed: the texts that {weights or DEFAULT_MODEL} chooses from")
        device = pick_device(device)
        found, shown = load_classifier(path, precision, device), open_image(image)
    precision = settle_precision(precision, device)
    answer = class_probabilities(found.tower, shown, found.transform(), precision=precision)
    ranked = sorted(zip(found.classes, answer, strict=True), key=lambda pair: -pair[1])
    _show(image, "class", ranked[:SHOWN])
    if out is not None:
        answers = [{"class": name, "probability": probability} for name, probability in ranked]
        write_json(out, {"image": str(image), "model": weights, "answers": answers})


def _show(image: Path, what: str, ranked: list[tuple[str, float]]) -> None:
    print(printable(image))  # not as the table's title, which is broken at the table's width
    table = Table(what, "probability")
    for text, probability in ranked:
        table.add_row(printable(text), f"{probability:.1%}")
    console().print(table)
