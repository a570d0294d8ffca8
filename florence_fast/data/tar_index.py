"""Where the members of a tar lie: its headers alone are read, and every number in them is checked.

The standard library's reader trusts the sizes in a tar: a negative one makes older versions loop for ever, a large one
fills the memory. It also ends at the first of several joined archives.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
# Long names and extended headers are small, and the zeros between joined archives are at most one record of tar's.
MAX_EXTENDED = 1 << 20
MAX_PADDING = 1 << 24

# Return ``size`` bytes from ``offset`` on, fewer at the end. Offsets never go back.
ReadAt = Callable[[int, int], bytes]


class DamagedTar(ValueError):
    """The archive cannot be read from some byte on; the message says from which, and why."""


class Member(NamedTuple):
    """A member: its name, where its data lie, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    plain: bool


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    goes_on: bool


def read_members(read: ReadAt) -> Iterator[Member]:
    """Yield the members of a tar, and of those joined to it, in their order; their data are not looked at.

    Raises:
        DamagedTar: a header is damaged, or the archive ends without its closing block.
    """
    offset, closed, extended = 0, False, {}
    while True:
        block = read(offset, BLOCK)
        if block == _ZEROS:
            closed = True
            offset, block = _skip_zeros(read, offset)
        if len(block) < BLOCK:
            if closed or not (offset or block):
                return
            raise DamagedTar(f"cut short at byte {offset + len(block):,}")
        if block == _ZEROS:
            return
        closed = False
        header = _parse_header(block, offset)
        data = offset + BLOCK
        if header.kind in b"xXgLK":
            if header.size > MAX_EXTENDED:
                raise DamagedTar(f"damaged at byte {offset:,}: an extended header of {header.size:,} bytes")
            extended |= _parse_extended(header.kind, read(data, header.size), offset)
            offset = _after(data, header.size)
            continue
        while header.goes_on:
            header = header._replace(goes_on=read(data, BLOCK)[504:505] not in (b"", b"\0"))
            data += BLOCK
        name = extended.get("path", header.name)
        size = extended.get("size", header.size)
        folder = header.kind == b"5" or name.endswith(b"/")
        if folder or header.kind in b"12346":  # links and devices have no data
            size = 0
        plain = header.kind in b"0\x007" and not folder and "sparse" not in extended
        extended = {}
        yield Member(name.decode("utf-8", "surrogateescape"), data, size, plain)
        offset = _after(data, size)


def _after(offset: int, size: int) -> int:
    """Where the next header lies: data are padded to whole blocks."""
    return offset + -(-size // BLOCK) * BLOCK


def _skip_zeros(read: ReadAt, offset: int) -> tuple[int, bytes]:
    """Return the first block from ``offset`` on that is not all zeros, and its place; or the last one looked at."""
    end = offset + MAX_PADDING
    while (block := read(offset, BLOCK)) == _ZEROS and offset < end:
        offset += BLOCK
    return offset, block


def _parse_header(block: bytes, offset: int) -> _Header:
    stored = _parse_number(block[148:156], offset)
    rest = block[:148] + block[156:]
    unsigned = sum(rest) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in rest) if stored != unsigned else unsigned
    if stored not in (unsigned, signed):
        raise DamagedTar(f"damaged at byte {offset:,}: no header with the right checksum")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    kind = block[156:157]
    size = _parse_number(block[124:136], offset)
    return _Header(prefix + b"/" + name if prefix else name, size, kind, kind == b"S" and block[482] != 0)


def _parse_number(field: bytes, offset: int) -> int:
    """Read octal digits or, where the first bit is set, a binary number; none is negative or beyond 63 bits."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip()
        number = int(digits or b"0", 8) if not digits.strip(b"01234567") else -1
    if not 0 <= number < 1 << 63:
        raise DamagedTar(f"damaged at byte {offset:,}: {bytes(field)!r} is no size")
    return number


def _parse_extended(kind: bytes, data: bytes, offset: int) -> dict:
    """Read what an extended header says of the next member: "path" (bytes), "size" (int), "sparse"."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0")}
    found: dict = {}
    position = 0
    while kind in b"xX" and position < len(data):
        digits = data[position : position + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[position + len(digits) + 1 : position + length]
        if position + length > len(data) or not record.endswith(b"\n"):
            raise DamagedTar(f"damaged at byte {offset:,}: an extended header with a wrong length")
        key, _, value = record[:-1].partition(b"=")
        if key == b"path":
            found["path"] = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise DamagedTar(f"damaged at byte {offset:,}: {value[:40]!r} is no size")
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = True
        position += length
    return found


class PlainFile:
    """Read a file at offsets."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by its user
        self._size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on."""
        size = min(size, self._size - offset)
        return os.pread(self._file.fileno(), size, offset) if size > 0 else b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class GzipFile:
    """Unpack a gzipped file piece by piece, and read what it unpacks to at offsets that never go back.

    A damaged file is read up to the damage, which ``fault`` then describes.
    """

    PIECE = 1 << 20

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by its user
        self._unpacker = zlib.decompressobj(wbits=31)
        self._packed = b""
        self._piece, self._start = b"", 0
        self.fault = ""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on."""
        found = bytearray()
        while True:
            skip = offset + len(found) - self._start
            found += self._piece[skip : skip + size - len(found)] if skip >= 0 else b""
            if len(found) == size or not self._unpack():
                return bytes(found)

    def _unpack(self) -> bool:
        """Replace the current piece by the next one; False at the end."""
        self._start += len(self._piece)
        self._piece = b""
        while not self._piece and not self.fault:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                return False
            try:
                self._piece = self._unpacker.decompress(self._packed, self.PIECE)
            except zlib.error as error:
                self.fault = str(error)
            if self._unpacker.eof:
                # Another part may follow, or zeros that fill up a block.
                self._packed = self._unpacker.unused_data.lstrip(b"\0")
                self._unpacker = zlib.decompressobj(wbits=31)
            else:
                self._packed = self._unpacker.unconsumed_tail
        return bool(self._piece)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
