"""``florence-fast search``: find pictures in a folder by words."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from florence_fast.cli.usage import (
    BatchSize,
    Device,
    Model,
    Precision,
    Pretrained,
    ResizeMode,
    load,
    refusals_as_wrong_usage,
    settle_precision,
)
from florence_fast.files import write_json, write_text
from florence_fast.printable import printable


def command(
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures, searched with all folders in it.")],
    query: Annotated[str, typer.Option("--query", help="The words to search for.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many pictures to show.")] = 12,
    model: Model = "florence_nano",
    pretrained: Pretrained = "artists",
    out: Annotated[Path, typer.Option("--out", help="Folder of results.json and contact_sheet.html.")] = Path(
        "runs/search"
    ),
    batch_size: BatchSize = 64,
    image_resize_mode: ResizeMode = None,
    precision: Precision = "auto",
    device: Device = None,
) -> None:
    """Find pictures in a folder by words.

    The ranked list goes to the screen and to results.json, the pictures themselves to one page, contact_sheet.html.
    """
    from florence_fast.evaluate import PictureFolder, index_pictures
    from florence_fast.evaluate import search as rank
    from florence_fast.evaluate.contact_sheet import contact_sheet
    from florence_fast.evaluate.features import device_of

    with refusals_as_wrong_usage():
        pictures = PictureFolder(images)
    net, tokenizer = load(model, pretrained, device, precision, image_resize_mode)
    precision = settle_precision(precision, device_of(net))
    index = index_pictures(net, pictures, batch_size=batch_size, precision=precision, progress=True)
    hits = rank(net, tokenizer, index, query, top)

    table = Table("", "picture", "cosine", title=printable(query), title_justify="left")
    for number, hit in enumerate(hits, start=1):
        table.add_row(str(number), printable(hit.path.relative_to(images)), f"{hit.score:.3f}")
    Console(markup=False, highlight=False).print(table)
    found = [{"path": str(hit.path), "score": hit.score} for hit in hits]
    write_json(out / "results.json", {"query": query, "model": model, "pretrained": pretrained, "hits": found})
    sheet = write_text(out / "contact_sheet.html", contact_sheet(query, hits, images))
    print(f"contact sheet: {printable(sheet)}")
