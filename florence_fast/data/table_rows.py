"""A row of a table: a pair, or the reason why it is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from florence_fast.data.pairs import PairText, clean_text, pair_text
from florence_fast.errors import did_you_mean
from florence_fast.printable import printable

_KEYS = {"image": "img_key (--csv-img-key)", "text": "caption_key (--csv-caption-key)"}


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a table.

    Args:
        number: of its line, or of its row in a Parquet file, from 1.
        image: path of the image; of one inside the file its name, which may be empty.
        text: None where the record is no pair.
        fault: why it is none.
    """

    number: int
    image: str = ""
    text: PairText | None = None
    fault: str = ""


def make_row(
    number: int,
    image: object,
    text: object,
    short_name: object = None,
    keywords: object = None,
    image_inside: bool = False,
) -> Row:
    """Check the fields of one pair; an image inside the file needs no path."""
    try:
        path = "" if image_inside and not image else clean_text(image, "path of an image")
        words = pair_text(text, short_name, keywords)
    except ValueError as error:
        return Row(number, fault=str(error))
    for name, value in (("path of an image", path), ("text", words.text)):
        if "\ufffd" in value:
            return Row(number, fault=f"the {name} is not UTF-8")
    return Row(number, path, words)


def find_column(path: Path, columns: Sequence[str], where: str, key: str, other: str) -> int:
    """Return the number of the column named ``key``, or else ``other``.

    Raises:
        ValueError: there is neither; ``where`` says in the message what holds the columns.
    """
    for name in (key, other):
        if name in columns:
            return columns.index(name)
    raise ValueError(
        f"{path} has no column {key!r}{did_you_mean(key, columns)}; {where} holds: "
        f"{printable(', '.join(columns), 300) or 'nothing'}; name one with {_KEYS[other]}"
    )
