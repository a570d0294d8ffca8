"""WebDataset shards read map-style: tars are indexed once by the offsets of their members.

Members of one key are one pair: ``KEY.webp`` (png, jpg, jpeg) with ``KEY.txt``, or with ``KEY.json`` that holds
``text`` (or ``caption``) and may hold ``short_name`` and ``keywords``. Anything else, pickles above all, is never
read. A plain tar is read in place; a ``.tar.gz`` has no places to jump to and is unpacked into memory.
"""

import io
import itertools
import logging
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.pictures import MAX_PIXELS, open_picture
from florence_fast.strict_json import parse_json

logger = logging.getLogger(__name__)

PICTURES = ("webp", "png", "jpg", "jpeg")
TEXTS = ("txt", "json")
# A member's key ends at the first dot of its base name; hidden files have none.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Sample(NamedTuple):
    """One key of one shard, and the (offset, size) of its members."""

    shard: int
    key: str
    members: dict[str, tuple[int, int]]


def is_tar(path: Path) -> bool:
    """Whether the name is one of a shard."""
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def expand_braces(spec: str) -> list[str]:
    """Write out the braces of a path: ``{000..002}`` counts with its leading zeros, ``{a,b}`` lists.

    >>> expand_braces("{train,val}-{8..10}.tar")[:2]
    ['train-8.tar', 'train-9.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", spec)
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """What one pair of braces stands for."""
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        if int(last) < int(first):
            raise ValueError(f"a range of shards must count upwards, got {{{inside}}}")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


class TarPairs(PairSource):
    """The pairs of one or more tars, in the order in which they lie there.

    A shard that is cut short is used as far as it goes, which is logged; the pair at the cut is unreadable.

    Args:
        paths: the shards.
        max_pixels: pictures larger than this are unreadable.

    Raises:
        ValueError: a shard is no tar, or holds no picture or no text.
    """

    def __init__(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
        self.paths, self.max_pixels = [Path(path) for path in paths], max_pixels
        self._unpacked: dict[int, bytes] = {}
        self.samples: list[Sample] = []
        for shard in range(len(self.paths)):
            self.samples += self._index(shard)

    def __len__(self) -> int:
        return len(self.samples)

    def texts(self, index: int) -> PairText:
        """Texts of sample ``index``: the ``txt`` member before the one in ``json``."""
        members = self.samples[index].members
        record = self._record(index) if "json" in members else {}
        caption = self._read(index, "txt").decode("utf-8") if "txt" in members else None
        text = caption or record.get("text") or record.get("caption")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("it has no text")
        short_name, keywords = record.get("short_name"), record.get("keywords") or []
        if not isinstance(short_name, str | None) or not isinstance(keywords, list):
            raise ValueError("short_name must be a string and keywords a list of strings")
        return PairText(text.strip(), short_name, [str(word) for word in keywords])

    def image(self, index: int) -> Image.Image:
        """Picture of sample ``index``."""
        for suffix in PICTURES:
            if suffix in self.samples[index].members:
                return open_picture(self._read(index, suffix), self.max_pixels)
        raise ValueError(f"it has no picture; known are {', '.join(PICTURES)}")

    def describe(self, index: int) -> str:
        """Shard and key of sample ``index``."""
        return f"{self.paths[self.samples[index].shard]}: {self.samples[index].key}"

    def _record(self, index: int) -> dict:
        record = parse_json(self._read(index, "json"), "its json")
        if not isinstance(record, dict):
            raise ValueError(f"its json is not an object but {type(record).__name__}")
        return record

    def _read(self, index: int, suffix: str) -> bytes:
        """Bytes of one member. The file is opened anew: processes that share this object share no position."""
        shard, _, members = self.samples[index]
        offset, size = members[suffix]
        if shard in self._unpacked:
            data = self._unpacked[shard][offset : offset + size]
        else:
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) < size:
            raise ValueError(f"its {suffix} is cut short: {len(data)} of {size} bytes")
        return data

    def _index(self, shard: int) -> list[Sample]:
        """Find the samples of one shard."""
        path = self.paths[shard]
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                self._unpacked[shard] = _unpack(path)
        members, whole = _list_members(path, self._unpacked.get(shard))
        samples: dict[str, Sample] = {}
        for name, place in members:
            found = _MEMBER.fullmatch(name)
            if found and (suffix := found.group(2).lower()) in PICTURES + TEXTS:
                sample = samples.setdefault(found.group(1), Sample(shard, found.group(1), {}))
                if suffix in sample.members:
                    raise ValueError(f"{path} holds two members {name!r}")
                sample.members[suffix] = place
        for kinds, what in ((PICTURES, "picture"), (TEXTS, "text")):
            if not any(kind in sample.members for sample in samples.values() for kind in kinds):
                raise ValueError(f"{path} holds no {what}: wanted members KEY.{', KEY.'.join(kinds)}")
        if not whole:
            logger.warning("%s is cut short: using the %d samples before the cut", path, len(samples))
        return list(samples.values())


def _unpack(path: Path) -> bytes:
    """Unpack a gzipped shard, as far as it goes."""
    unpacked, unpacker = bytearray(), zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        try:
            while piece := file.read(1 << 16):
                while piece:
                    unpacked += unpacker.decompress(piece)
                    piece = unpacker.unused_data
                    if unpacker.eof:
                        unpacker = zlib.decompressobj(wbits=31)
        except zlib.error as error:
            logger.warning("%s is damaged: %s", path, error)
    return bytes(unpacked)


def _list_members(path: Path, unpacked: bytes | None) -> tuple[list[tuple[str, tuple[int, int]]], bool]:
    """Names and places of the plain files in a tar, and whether it is whole, that is, has its closing block."""
    members: list[tuple[str, tuple[int, int]]] = []
    try:
        with (
            open(path, "rb") if unpacked is None else io.BytesIO(unpacked) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            try:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        members.append((member.name, (member.offset_data, member.size)))
            except tarfile.ReadError:
                return members, False
            file.seek(tar.offset)
            return members, file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar: {error}") from error
