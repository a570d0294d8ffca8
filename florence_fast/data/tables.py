"""Pairs listed in a table: CSV, TSV, Parquet, or JSON objects one a line."""

import csv
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from PIL import Image

from florence_fast.data.csv_records import read_records, split_header, split_line
from florence_fast.data.images import open_image
from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.parquet import ImagesInside, read_parquet
from florence_fast.data.table_rows import Row, find_column, make_row
from florence_fast.printable import printable
from florence_fast.strict_json import BYTE_ORDER_MARK, parse_json

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_LINE = 1 << 24
_SEP_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # before the header, as spreadsheets write and read it


def is_table(path: Path) -> bool:
    """Whether the suffix is one of a table."""
    return path.suffix.lower() in SUFFIXES


class TablePairs(PairSource):
    """Pairs of one table; a damaged row keeps its place and says what is wrong when it is read."""

    def __init__(self, path: Path, rows: list[Row], max_pixels: int, inside: ImagesInside | None = None) -> None:
        self.path, self.rows, self.max_pixels, self._inside = path, rows, max_pixels, inside

    @classmethod
    def read(cls, path: Path, img_key: str, caption_key: str, separator: str | None, max_pixels: int) -> "TablePairs":
        """Read the whole table; its images are opened when they are asked for.

        Rows that are no pairs, and quote marks that had to be read as plain characters, are counted in the log.

        Raises:
            ValueError: it has no such columns, or no row that is a pair, or it is not of the kind its suffix says.
            ImportError: a Parquet file without the package that reads it.
        """
        kind, inside = path.suffix.lower(), None
        if kind == ".parquet":
            rows, inside = read_parquet(path, img_key, caption_key)
        else:
            # Bytes that are no UTF-8 become U+FFFD, and spoil their row only.
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                _refuse_other_encodings(path)
                if kind == ".jsonl":
                    rows = [_json_row(n, line, img_key, caption_key) for n, line in _filled(_lines(path, file))]
                else:
                    rows = list(_csv_rows(path, _lines(path, file), img_key, caption_key, separator))
        if not rows:
            raise ValueError(f"{path} holds no image-text pair")
        faulty = [row for row in rows if row.fault]
        if len(faulty) == len(rows):
            raise ValueError(f"none of the {len(rows)} rows of {path} is an image-text pair; row 1: {rows[0].fault}")
        if faulty:
            logger.warning(
                "%s: %d of %d rows are no image-text pairs, the first is in line %d: %s",
                *(printable(path), len(faulty), len(rows), faulty[0].number, printable(faulty[0].fault)),
            )
        return cls(path, rows, max_pixels, inside)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, index: int) -> PairText:
        """Texts of row ``index``."""
        row = self.rows[index]
        if row.text is None:
            raise ValueError(row.fault)
        return row.text

    def image(self, index: int) -> Image.Image:
        """Image of row ``index``: in the file, or relative to the table's folder or else to the working folder."""
        row = self.rows[index]
        if row.text is None:
            raise ValueError(row.fault)
        data = None if self._inside is None else self._inside.read(row.number - 1)
        if data is not None:
            return open_image(data, self.max_pixels)
        if not row.image:
            raise ValueError("it has no image")
        for folder in (self.path.parent, Path()):
            if (folder / row.image).exists():
                return open_image(folder / row.image, self.max_pixels)
        raise FileNotFoundError(
            f"there is no {printable(row.image)}, neither in the table's folder {printable(self.path.parent)} nor in "
            f"the working folder {printable(Path.cwd())}"
        )

    def describe(self, index: int) -> str:
        """Table, line and image."""
        row = self.rows[index]
        return printable(f"{self.path}:{row.number}" + (f" ({row.image})" if row.image else ""))


def _refuse_other_encodings(path: Path) -> None:
    """Refuse what its first line shows not to be UTF-8."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is gzipped: unpack it")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16: save it as UTF-8")
    line = start.partition(b"\n")[0].rstrip(b"\0")
    if b"\0" in line:
        raise ValueError(f"{path} begins with null characters, as UTF-16 and UTF-32 have them: save it as UTF-8")


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a table; one that fills the memory is the sign of another kind of file."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith(("\n", "\r")):
            raise ValueError(f"{path} has a line of more than {MAX_LINE:,} characters: it is no table")
        yield line


def _filled(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _json_row(number: int, line: str, img_key: str, caption_key: str) -> Row:
    try:
        record = parse_json(line, "the line")
    except ValueError as error:
        return Row(number, fault=str(error))
    if not isinstance(record, dict):
        return Row(number, fault=f"not a JSON object but {type(record).__name__}")
    image = record.get(img_key, record.get("image"))
    text = record.get(caption_key, record.get("text"))
    return make_row(number, image, text, record.get("short_name"), record.get("keywords"))


def _csv_rows(path: Path, lines: Iterator[str], img_key: str, caption_key: str, separator: str | None) -> Iterator[Row]:
    header, first = next(lines, "").lstrip(BYTE_ORDER_MARK), 2
    if said := _SEP_LINE.fullmatch(header.strip()):
        header, first, separator = next(lines, ""), 3, separator or said[1]
    if separator is None:
        usual = "\t" if path.suffix.lower() == ".tsv" else ","
        separator, columns = split_header(header, ((img_key, "image"), (caption_key, "text")), usual)
    else:
        columns = split_line(header, separator)
    where = f"its header, split at {separator!r},"
    image = find_column(path, columns, where, img_key, "image")
    text = find_column(path, columns, where, caption_key, "text")
    limit, stray = csv.field_size_limit(), []
    for number, fields, is_stray in read_records(lines, separator, len(columns), image, first):
        if is_stray:
            stray.append(number)
        if max(map(len, fields)) > limit:
            yield Row(number, fault=f"field larger than field limit ({limit})")
        elif len(fields) == len(columns):
            yield make_row(number, fields[image], fields[text])
        else:
            hint = ", and a quote mark without its partner" if is_stray else ""
            yield Row(number, fault=f"{len(fields)} fields where the header has {len(columns)}{hint}")
    if stray:
        logger.warning(
            "%s: %d rows hold a quote mark that opens or closes no field, the first is in line %d; their quote marks "
            "were read as they stand",
            *(printable(path), len(stray), stray[0]),
        )
