"""Read untrusted text files: UTF-8, with or without a byte-order mark, and of limited size."""

import os
from pathlib import Path
from typing import Any

from florence_fast.strict_json import BYTE_ORDER_MARK, parse_json

MAX_BYTES = 64 << 20


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file without its byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no plain file (a pipe, a device), is larger than ``max_bytes``, or is not UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is not a plain file")
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} is larger than the {max_bytes:,} bytes that are read of such a file")
    return decode_text(data, str(path))


def decode_text(data: bytes, what: str) -> str:
    """Decode UTF-8 without its byte-order mark.

    Args:
        data: the bytes.
        what: what the error message calls them.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8").lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; it seems to be UTF-16: save it as UTF-8" if utf_16 else ""
        raise ValueError(f"{what} is not UTF-8: {error}{hint}") from error


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a UTF-8 file that are not blank, stripped, without byte-order marks.

    Raises:
        OSError, ValueError: as `read_text`.
    """
    lines = (line.strip().strip(BYTE_ORDER_MARK).strip() for line in read_text(path).split("\n"))
    return [line for line in lines if line]


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        OSError, ValueError: as `read_text` and `parse_json`; the message names the file.
    """
    return parse_json(read_text(path), str(path))
