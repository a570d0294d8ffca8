"""Records of CSV and TSV files, read so that a stray quote mark costs no other row.

A quoted field may hold separators and line breaks (RFC 4180). In captions a quote mark is often just a sign: a field
that opens with one and never closes it would take in all rows up to the next quote mark. So a field ends where a line
begins that is a row by itself, and a line whose quotes do not work out is split as it stands.
"""

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from florence_fast.data.images import SUFFIXES

SEPARATOR_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
DETECTED = ("\t", ",", ";", "|")
MAX_LINES_OF_A_FIELD = 100


class Record(NamedTuple):
    """One record: the number of its first line, its fields, and whether its quote marks were taken as signs."""

    number: int
    fields: list[str]
    stray: bool


def parse_separator(separator: str | None) -> str | None:
    r"""Return the character that ``separator`` means: itself, or "tab", "\t" typed as two characters, "comma", ...

    Raises:
        ValueError: it is not one character, or one that cannot separate.
    """
    if separator is None:
        return None
    if isinstance(separator, str):
        separator = SEPARATOR_NAMES.get(separator.lower(), separator)
        if len(separator) == 1 and separator not in '"\r\n\0':
            return separator
    raise ValueError(f"separator must be one character, or one of {', '.join(SEPARATOR_NAMES)}, got {separator!r}")


def split_header(header: str, wanted: Iterable[tuple[str, ...]], preferred: str) -> tuple[str, list[str]]:
    """Find the separator of a table in its header.

    Args:
        header: the first line.
        wanted: for each column that must be there, its possible names.
        preferred: the separator to fall back on.

    Returns:
        The separator that gives all wanted columns, and the columns.
    """
    wanted = list(wanted)
    for separator in dict.fromkeys((preferred, *DETECTED)):
        columns = split_line(header, separator)
        if all(any(name in columns for name in names) for names in wanted):
            return separator, columns
    separator = preferred if preferred in header else max(DETECTED, key=header.count)
    return separator, split_line(header, separator)


def split_line(line: str, separator: str) -> list[str]:
    """Split one line, by its quotes where they work out and as it stands where they do not."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return line.rstrip("\r\n").split(separator)


def read_records(
    lines: Iterable[str], separator: str, num_columns: int, image: int, first: int = 2
) -> Iterator[Record]:
    """Yield the records of the lines that follow a header.

    Args:
        lines: lines with their ends.
        separator: one character.
        num_columns: columns of the header.
        image: number of the column with the image's path, by whose suffix a line is known to be a row.
        first: number of the first of ``lines`` in its file.
    """
    return _Reader(lines, separator, num_columns, image).records(first)


class _Reader:
    def __init__(self, lines: Iterable[str], separator: str, num_columns: int, image: int) -> None:
        self._lines, self._separator = iter(lines), separator
        self._num_columns, self._image = num_columns, image
        self._put_back: deque[str] = deque()
        self._suffixes = tuple(SUFFIXES)

    def records(self, number: int) -> Iterator[Record]:
        first = True
        while (line := self._next()) is not None:
            fields, num_lines, stray = line.rstrip("\r\n").split(self._separator), 1, False
            if '"' in line:
                fields, num_lines, stray = self._quoted(line, fields)
            if len(fields) > 1 or fields[0]:
                if first and len(fields) == self._num_columns and not self._is_image(fields):
                    self._suffixes = ("",)  # names without a suffix: the number of fields makes a row
                first = False
                yield Record(number, fields, stray)
            number += num_lines

    def _quoted(self, line: str, as_it_stands: list[str]) -> tuple[list[str], int, bool]:
        """Read a record that begins with ``line``: its fields, its number of lines, and whether a quote is stray."""
        try:
            return next(csv.reader([line], delimiter=self._separator, strict=True)), 1, False
        except csv.Error:
            pass  # a field goes on in the next line, or a quote mark is stray
        taken: list[str] = []
        lines = chain([line], self._more(line, as_it_stands, taken))
        reader = csv.reader(lines, delimiter=self._separator, strict=True)
        try:
            return next(reader), 1 + len(taken), False
        except csv.Error:
            self._put_back.extendleft(reversed(taken))
            return as_it_stands, 1, True

    def _more(self, line: str, as_it_stands: list[str], taken: list[str]) -> Iterator[str]:
        """Yield the lines that may belong to the field that ``line`` leaves open; they are noted in ``taken``."""
        opened = len(next(csv.reader([line], delimiter=self._separator))) - 1
        before_image = opened < self._image
        if before_image and self._is_row(as_it_stands):
            return
        while len(taken) < MAX_LINES_OF_A_FIELD and (following := self._next()) is not None:
            closes = before_image and following.count('"') % 2 == 1
            split = following.rstrip("\r\n").split(self._separator)
            if not closes and (self._is_row(split) or self._is_row(split_line(following, self._separator))):
                self._put_back.appendleft(following)
                return
            taken.append(following)
            yield following

    def _is_row(self, fields: list[str]) -> bool:
        return len(fields) == self._num_columns and self._is_image(fields)

    def _is_image(self, fields: list[str]) -> bool:
        return fields[self._image].strip().strip('"').lower().endswith(self._suffixes)

    def _next(self) -> str | None:
        return self._put_back.popleft() if self._put_back else next(self._lines, None)
