"""``florence-fast search``: find images in a folder by words."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from florence_fast.cli.outputs import check_out_file, check_out_folder
from florence_fast.cli.usage import (
    BatchSize,
    Device,
    ModelOfWeights,
    Precision,
    Pretrained,
    ResizeMode,
    load,
    refusals_as_wrong_usage,
    settle_precision,
    weights_of,
)
from florence_fast.console import console
from florence_fast.files import write_json, write_text
from florence_fast.printable import printable

RESULTS, SHEET = "results.json", "contact_sheet.html"


def command(
    images: Annotated[Path, typer.Option("--images", help="Folder of images, searched with all folders in it.")],
    query: Annotated[list[str], typer.Option("--query", help="The words to search for; repeat it for more searches.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many images to show.")] = 12,
    model: ModelOfWeights = None,
    pretrained: Pretrained = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of results.json and contact_sheet.html.")] = Path(
        "runs/search"
    ),
    index: Annotated[
        Path | None,
        typer.Option("--index", help="Keep the features in this file: the next search encodes new images only."),
    ] = None,
    batch_size: BatchSize = 64,
    image_resize_mode: ResizeMode = None,
    precision: Precision = "auto",
    device: Device = None,
) -> None:
    """Find images in a folder by words.

    Prints the ranked list, and writes it to results.json and the images to one page, contact_sheet.html.
    """
    from florence_fast.evaluate import ImageFolder, index_images
    from florence_fast.evaluate import search as rank
    from florence_fast.evaluate.contact_sheet import contact_sheets
    from florence_fast.evaluate.feature_file import check_feature_file
    from florence_fast.evaluate.features import device_of

    check_out_folder("--out", out)
    check_out_file("--out", out / RESULTS)
    check_out_file("--out", out / SHEET)
    check_out_file("--index", index)
    with refusals_as_wrong_usage():
        if index is not None:
            check_feature_file(index)
        folder = ImageFolder(images)
    model, pretrained = weights_of(model, pretrained, note=True)
    net, tokenizer = load(model, pretrained, device, precision, image_resize_mode)
    precision = settle_precision(precision, device_of(net))
    indexed = index_images(net, folder, batch_size=batch_size, precision=precision, progress=True, file=index)

    searches = [(words, rank(net, tokenizer, indexed, words, top)) for words in query]
    found = []
    for words, hits in searches:
        table = Table("", "image", "cosine", title=printable(words), title_justify="left")
        for number, hit in enumerate(hits, start=1):
            table.add_row(str(number), printable(hit.path.relative_to(images)), f"{hit.score:.3f}")
        console().print(table)
        found.append({"query": words, "hits": [{"path": str(hit.path), "score": hit.score} for hit in hits]})
    answer = found[0] if len(found) == 1 else {"searches": found}
    write_json(out / RESULTS, {"model": model, "pretrained": pretrained, **answer})
    sheet = write_text(out / SHEET, contact_sheets(searches, images))
    print(f"contact sheet: {printable(sheet)}")
