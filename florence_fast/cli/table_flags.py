"""The flags, named as open_clip's, that say which columns of a table hold the pairs."""

from typing import Annotated

import typer

CsvImgKey = Annotated[str, typer.Option("--csv-img-key", help="Column of a table with the image's path.")]
CsvCaptionKey = Annotated[str, typer.Option("--csv-caption-key", help="Column of a table with the text.")]
CsvSeparator = Annotated[
    str | None,
    typer.Option(
        "--csv-separator",
        help="Between columns: a character, or tab, comma, semicolon, pipe.",
        show_default="as the header shows",
    ),
]
