"""Pairs listed in a table: CSV, TSV, or JSON objects one a line."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.pictures import open_picture
from florence_fast.errors import did_you_mean
from florence_fast.strict_json import parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a pair, or the reason why it is none."""

    number: int
    picture: str = ""
    text: PairText | None = None
    fault: str = ""


def is_table(path: Path) -> bool:
    """Whether the suffix is one of a table."""
    return path.suffix.lower() in SUFFIXES


class TablePairs(PairSource):
    """Pairs of one table; a damaged row keeps its place and says what is wrong when it is read."""

    def __init__(self, path: Path, rows: list[Row], max_pixels: int) -> None:
        self.path, self.rows, self.max_pixels = path, rows, max_pixels

    @classmethod
    def read(cls, path: Path, img_key: str, caption_key: str, separator: str | None, max_pixels: int) -> "TablePairs":
        """Read the whole table; its pictures are opened when they are asked for.

        Raises:
            ValueError: it has no such columns, or no row that is a pair.
        """
        # Bytes that are no UTF-8 become U+FFFD, and spoil their row only.
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as lines:
            if path.suffix.lower() == ".jsonl":
                rows = [_json_row(number, line, img_key, caption_key) for number, line in _filled(lines)]
            else:
                rows = list(_csv_rows(path, lines, img_key, caption_key, separator))
        if not rows:
            raise ValueError(f"{path} holds no image-text pair")
        if all(row.fault for row in rows):
            raise ValueError(f"none of the {len(rows)} rows of {path} is an image-text pair; row 1: {rows[0].fault}")
        return cls(path, rows, max_pixels)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, index: int) -> PairText:
        """Texts of row ``index``."""
        row = self.rows[index]
        if row.text is None:
            raise ValueError(row.fault)
        return row.text

    def image(self, index: int) -> Image.Image:
        """Picture of row ``index``: relative to the table's folder or, failing that, to the working folder."""
        row = self.rows[index]
        if row.text is None:
            raise ValueError(row.fault)
        beside = self.path.parent / row.picture
        return open_picture(beside if beside.exists() else row.picture, self.max_pixels)

    def describe(self, index: int) -> str:
        """Table, line and picture."""
        row = self.rows[index]
        return f"{self.path}:{row.number}" + (f" ({row.picture})" if row.picture else "")


def _filled(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _row(number: int, picture: Any, text: Any, short_name: Any = None, keywords: Any = None) -> Row:
    """Check the fields of one pair."""
    for name, value in (("path of a picture", picture), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            return Row(number, fault=f"no {name}")
        if "\ufffd" in value:
            return Row(number, fault=f"the {name} is not UTF-8")
    if short_name is not None and not isinstance(short_name, str):
        return Row(number, fault=f"short_name must be a string, got {short_name!r}")
    if not isinstance(keywords or [], list) or not all(isinstance(word, str) for word in keywords or []):
        return Row(number, fault=f"keywords must be a list of strings, got {keywords!r}")
    return Row(number, picture.strip(), PairText(text.strip(), short_name, keywords or []))


def _json_row(number: int, line: str, img_key: str, caption_key: str) -> Row:
    try:
        record = parse_json(line, "the line")
    except ValueError as error:
        return Row(number, fault=str(error))
    if not isinstance(record, dict):
        return Row(number, fault=f"not a JSON object but {type(record).__name__}")
    picture = record.get(img_key, record.get("image"))
    text = record.get(caption_key, record.get("text"))
    return _row(number, picture, text, record.get("short_name"), record.get("keywords"))


def _csv_rows(path: Path, lines: Iterator[str], img_key: str, caption_key: str, separator: str | None) -> Iterator[Row]:
    header = next(lines, "")
    separator = separator or ("\t" if path.suffix.lower() == ".tsv" or "\t" in header else ",")
    columns = next(csv.reader([header], delimiter=separator), [])
    picture = _column(path, columns, separator, img_key, "image")
    text = _column(path, columns, separator, caption_key, "text")
    reader = csv.reader(lines, delimiter=separator)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(reader.line_num + 1, fault=str(error))
            continue
        number = reader.line_num + 1
        if len(fields) == len(columns):
            yield _row(number, fields[picture], fields[text])
        elif fields:
            yield Row(number, fault=f"{len(fields)} fields where the header has {len(columns)}")


def _column(path: Path, columns: list[str], separator: str, key: str, other: str) -> int:
    """Number of the column named ``key``, or else ``other``."""
    for name in (key, other):
        if name in columns:
            return columns.index(name)
    raise ValueError(
        f"{path} has no column {key!r}{did_you_mean(key, columns)}; its header, split at {separator!r}, "
        f"holds: {', '.join(columns) or 'nothing'}"
    )
