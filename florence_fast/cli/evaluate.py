"""``florence-fast evaluate zero-shot | retrieval | classification``: figures for a model on images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florence_fast.cli.outputs import check_out_file
from florence_fast.cli.table_flags import CsvCaptionKey, CsvImgKey, CsvSeparator
from florence_fast.cli.usage import (
    BatchSize,
    Device,
    MaxBadShare,
    ModelOfWeights,
    Precision,
    Pretrained,
    ResizeMode,
    load,
    one_of,
    pick_device,
    refusals_as_wrong_usage,
    settle_precision,
    weights_of,
)
from florence_fast.files import write_json
from florence_fast.strict_json import format_json
from florence_fast.text_files import read_lines

if TYPE_CHECKING:
    from florence_fast.data.pairs import PairSource

commands = typer.Typer(no_args_is_help=False, help="Measure a model: zero-shot, retrieval, classification.")

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Images with texts: CSV, TSV, JSONL or Parquet file, folder, or WebDataset tars ('{000..010}', '*'); "
        "'artists' for the shipped images of the artist that the demo never trains on.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the figures here, as JSON.")]
TEMPLATE_SETS = ("plain", "simple", "openai")


@commands.command("zero-shot")
def zero_shot(
    data: Data,
    csv_img_key: CsvImgKey = "filepath",
    csv_caption_key: CsvCaptionKey = "title",
    csv_separator: CsvSeparator = None,
    classnames: Annotated[
        Path | None,
        typer.Option("--classnames", help="Text file, one class name a line.", show_default="the texts of --data"),
    ] = None,
    templates: Annotated[
        str,
        typer.Option(
            "--templates",
            callback=one_of(*TEMPLATE_SETS),
            help="plain (the name itself), simple (7) or openai (80 sentences).",
        ),
    ] = "plain",
    model: ModelOfWeights = None,
    pretrained: Pretrained = None,
    out: Out = None,
    batch_size: BatchSize = 256,
    image_resize_mode: ResizeMode = None,
    precision: Precision = "auto",
    max_bad_share: MaxBadShare = 0.01,
    device: Device = None,
) -> None:
    """Zero-shot classification: top-1, top-5 and top-10 accuracy over all names."""
    from florence_fast.evaluate import class_indices, with_texts
    from florence_fast.evaluate import zero_shot as measure
    from florence_fast.evaluate.features import device_of

    check_out_file("--out", out)
    model, pretrained = weights_of(model, pretrained)
    with refusals_as_wrong_usage():
        source, texts = with_texts(_open(data, csv_img_key, csv_caption_key, csv_separator), max_bad_share)
        names = _class_names(classnames, data, texts)
        class_indices(texts, names)
    sentences = _template_set(templates)
    net, tokenizer = load(model, pretrained, device, precision, image_resize_mode)
    precision = settle_precision(precision, device_of(net))
    figures = measure(
        net,
        tokenizer,
        source,
        names,
        sentences,
        batch_size=batch_size,
        precision=precision,
        max_bad_share=max_bad_share,
        progress=True,
    )
    _report(out, "zero-shot", data, model, pretrained, figures)


@commands.command("retrieval")
def retrieval(
    data: Data,
    csv_img_key: CsvImgKey = "filepath",
    csv_caption_key: CsvCaptionKey = "title",
    csv_separator: CsvSeparator = None,
    template: Annotated[str, typer.Option("--template", help="The prompt; {} stands for the text.")] = "{}",
    model: ModelOfWeights = None,
    pretrained: Pretrained = None,
    out: Out = None,
    batch_size: BatchSize = 256,
    image_resize_mode: ResizeMode = None,
    precision: Precision = "auto",
    max_bad_share: MaxBadShare = 0.01,
    device: Device = None,
) -> None:
    """Recall at 1, 5 and 10 from images to texts and from texts to images."""
    from florence_fast.data.prompts import fill
    from florence_fast.evaluate import retrieval as measure
    from florence_fast.evaluate.features import device_of

    check_out_file("--out", out)
    model, pretrained = weights_of(model, pretrained)
    with refusals_as_wrong_usage():
        fill(template, "")
        source = _open(data, csv_img_key, csv_caption_key, csv_separator)
    net, tokenizer = load(model, pretrained, device, precision, image_resize_mode)
    precision = settle_precision(precision, device_of(net))
    figures = measure(
        net,
        tokenizer,
        source,
        template=template,
        batch_size=batch_size,
        precision=precision,
        max_bad_share=max_bad_share,
        progress=True,
    )
    _report(out, "retrieval", data, model, pretrained, figures)


@commands.command("classification")
def classification(
    data: Annotated[str, typer.Option("--data", help="Folder with one folder a class.")],
    model: Annotated[
        str,
        typer.Option("--model", "--pretrained", help="Folder of a run of `train classification`, or its weights."),
    ],
    out: Out = None,
    batch_size: BatchSize = 64,
    precision: Precision = "auto",
    max_bad_share: MaxBadShare = 0.01,
    device: Device = None,
) -> None:
    """Accuracy of a fine-tuned model: over all images, and as the mean over classes."""
    from florence_fast.data.class_folders import ClassFolders
    from florence_fast.evaluate.classification import classification as measure
    from florence_fast.models.classifier import load_classifier

    check_out_file("--out", out)
    with refusals_as_wrong_usage():
        device = pick_device(device)
        found = load_classifier(model, precision, device)
        source = ClassFolders(data, found.classes)
    precision = settle_precision(precision, device)
    figures = measure(
        found.tower,
        source,
        found.transform(),
        batch_size=batch_size,
        precision=precision,
        max_bad_share=max_bad_share,
    )
    _report(out, "classification", data, model, None, figures)


def _open(data: str, img_key: str, caption_key: str, separator: str | None) -> "PairSource":
    from florence_fast.data.artists import artists_test
    from florence_fast.data.pairs import open_pairs

    if data == "artists":
        return artists_test()
    return open_pairs(data, img_key=img_key, caption_key=caption_key, separator=separator)


def _class_names(file: Path | None, data: str, texts: list[str]) -> list[str]:
    """Names from a file, the demo's whole vocabulary for its own images, or the distinct texts of the data."""
    if file is not None:
        return read_lines(file)
    if data == "artists":
        from florence_fast.data.artists import artists_names

        return artists_names()
    from florence_fast.data.labels import text_label

    return sorted({text_label(text): text for text in reversed(texts)}.values())


def _template_set(name: str) -> list[str]:
    from florence_fast.data.prompts import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    sets = (["{}"], SIMPLE_IMAGENET_TEMPLATES, OPENAI_IMAGENET_TEMPLATES)
    return list(sets[TEMPLATE_SETS.index(name)])


def _report(
    out: Path | None, task: str, data: str, model: str, pretrained: str | None, figures: dict[str, Any]
) -> None:
    record = {"task": task, "data": data, "model": model, "pretrained": pretrained, **figures}
    print(format_json(record, indent=2))
    if out is not None:
        write_json(out, record)
