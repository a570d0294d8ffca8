"""WebDataset shards read map-style: tars are indexed once by the offsets of their members.

Members of one key are one pair: ``KEY.webp`` (png, jpg, jpeg) with ``KEY.txt``, or with ``KEY.json`` that holds
``text`` (or ``caption``) and may hold ``short_name`` and ``keywords``. The key is the name up to its last dot, so it
may hold dots itself. Anything else, pickles above all, is never read, and is counted in the log. A plain tar is read
in place; a ``.tar.gz`` has no places to jump to: the images and texts in it are unpacked into memory.
"""

import itertools
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from florence_fast.data.images import MAX_PIXELS, open_image
from florence_fast.data.left_out import LeftOut
from florence_fast.data.pairs import PairSource, PairText, pair_text
from florence_fast.data.tar_index import DamagedTar, GzipFile, PlainFile, read_members
from florence_fast.printable import printable
from florence_fast.strict_json import parse_json
from florence_fast.text_files import decode_text

logger = logging.getLogger(__name__)

IMAGES = ("webp", "png", "jpg", "jpeg")
TEXTS = ("txt", "json")
# Larger members are unreadable.
MAX_BYTES = {**dict.fromkeys(IMAGES, 1 << 29), **dict.fromkeys(TEXTS, 1 << 24)}
# A gzipped shard may unpack to this much, and to this many times its size: images hardly shrink.
UNPACKED_AT_LEAST, UNPACKED_RATIO = 1 << 28, 20
MAX_SHARDS = 1_000_000
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
    if (count := math.prod(map(len, choices))) > MAX_SHARDS:
        raise ValueError(f"{spec!r} stands for {count:,} files, more than the limit of {MAX_SHARDS:,}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """What one pair of braces stands for."""
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        if int(last) < int(first):
            raise ValueError(f"a range of shards must count upwards, got {{{inside}}}")
        if int(last) - int(first) >= MAX_SHARDS:
            raise ValueError(f"{{{inside}}} stands for more than {MAX_SHARDS:,} shards")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


class TarPairs(PairSource):
    """The pairs of one or more tars, in the order in which they lie there.

    A shard that is cut short or damaged is used as far as it goes, which is logged; the pair at the cut is unreadable.
    Tars joined to one file are read to the end of the last.

    Args:
        paths: the shards.
        max_pixels: images larger than this are unreadable.

    Raises:
        ValueError: a shard is no tar, holds no image or no text, or is gzipped and unpacks to more than 256 MiB and
            20 times its size.
    """

    def __init__(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> None:
        self.paths, self.max_pixels = [Path(path) for path in paths], max_pixels
        self._unpacked: dict[int, bytes] = {}
        self.samples: list[Sample] = []
        left_out = LeftOut()
        for shard in range(len(self.paths)):
            self.samples += self._index(shard, left_out)
        if left_out:
            more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
            logger.warning("%s%s: members left out: %s", printable(self.paths[0]), more, left_out)

    def __len__(self) -> int:
        return len(self.samples)

    def texts(self, index: int) -> PairText:
        """Texts of sample ``index``: the ``txt`` member before the one in ``json``."""
        members = self.samples[index].members
        record = self._record(index) if "json" in members else {}
        caption = decode_text(self._read(index, "txt"), "its txt") if "txt" in members else ""
        keywords = record.get("keywords")
        return pair_text(
            caption if caption.strip() else record.get("text") or record.get("caption"),
            record.get("short_name"),
            [str(word) for word in keywords] if isinstance(keywords, list) else keywords,
        )

    def image(self, index: int) -> Image.Image:
        """Image of sample ``index``."""
        for suffix in IMAGES:
            if suffix in self.samples[index].members:
                return open_image(self._read(index, suffix), self.max_pixels)
        raise ValueError(f"it has no image; known are {', '.join(IMAGES)}")

    def describe(self, index: int) -> str:
        """Shard and key of sample ``index``."""
        return printable(f"{self.paths[self.samples[index].shard]}: {self.samples[index].key}")

    def _record(self, index: int) -> dict:
        record = parse_json(self._read(index, "json"), "its json")
        if not isinstance(record, dict):
            raise ValueError(f"its json is not an object but {type(record).__name__}")
        return record

    def _read(self, index: int, suffix: str) -> bytes:
        """Bytes of one member. The file is opened anew: processes that share this object share no position."""
        shard, _, members = self.samples[index]
        offset, size = members[suffix]
        if size > MAX_BYTES[suffix]:
            raise ValueError(f"its {suffix} has {size:,} bytes, more than the limit of {MAX_BYTES[suffix]:,}")
        if shard in self._unpacked:
            data = self._unpacked[shard][offset : offset + size]
        else:
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) < size:
            raise ValueError(f"its {suffix} is cut short: {len(data)} of {size} bytes")
        return data

    def _index(self, shard: int, left_out: LeftOut) -> list[Sample]:
        """Find the samples of one shard."""
        path = self.paths[shard]
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        file = GzipFile(path) if packed else PlainFile(path)
        try:
            samples, fault = self._read_index(shard, file, left_out)
        finally:
            file.close()
        for kinds, what in ((IMAGES, "image"), (TEXTS, "text")):
            if not any(kind in sample.members for sample in samples.values() for kind in kinds):
                raise ValueError(f"{path} holds no {what}: wanted members KEY.{', KEY.'.join(kinds)}")
        for key in [key for key, sample in samples.items() if _belongs_to_another(key, sample, samples)]:
            left_out.add("of a pair that has its own", *(f"{key}.{suffix}" for suffix in samples.pop(key).members))
        if fault:
            logger.warning("%s is %s; using the %d samples before", printable(path), fault, len(samples))
        return list(samples.values())

    def _read_index(self, shard: int, file: GzipFile | PlainFile, left_out: LeftOut) -> tuple[dict[str, Sample], str]:
        """Collect the members of each key, and say what is wrong with the shard; unpack it where it is packed."""
        path, samples, fault, count = self.paths[shard], {}, "", 0
        empty = not file.read(0, 1)
        unpacked, most = bytearray(), max(UNPACKED_AT_LEAST, UNPACKED_RATIO * path.stat().st_size)
        try:
            for member in read_members(file.read):
                count += 1
                base = member.name.rpartition("/")[2]
                key, _, suffix = member.name.rpartition(".")
                suffix = suffix.lower()
                if base.startswith(".") or not base:
                    continue
                if not member.plain or "." not in base or suffix not in MAX_BYTES:
                    kind = f"of kind .{suffix}" if "." in base else "without a suffix"
                    left_out.add(kind if member.plain else "that are links or devices", member.name)
                    continue
                place = (member.offset, member.size)
                if isinstance(file, GzipFile):
                    place = (len(unpacked), member.size)
                    if member.size <= MAX_BYTES[suffix]:
                        unpacked += file.read(member.offset, member.size)
                    if len(unpacked) > most:
                        raise ValueError(f"{path} unpacks to more than {most:,} bytes: unpack it to a plain tar first")
                sample = samples.setdefault(key, Sample(shard, key, {}))
                if suffix in sample.members:
                    raise ValueError(f"{path} holds two members {member.name!r}")
                sample.members[suffix] = place
        except DamagedTar as error:
            fault = str(error)
        if isinstance(file, GzipFile):
            self._unpacked[shard] = bytes(unpacked)
            fault = f"damaged: {file.fault}" if file.fault else fault
        if empty or (fault and not count):
            raise ValueError(f"{path} is not a readable tar: {fault or 'empty file'}")
        return samples, fault


def _belongs_to_another(key: str, sample: Sample, samples: dict[str, Sample]) -> bool:
    """Whether a key with dots is no pair but something more about another: ``x.mask.png`` beside x.png and x.txt."""
    if any(kind in sample.members for kind in IMAGES) and any(kind in sample.members for kind in TEXTS):
        return False
    folder, slash, base = key.rpartition("/")
    parts = base.split(".")
    return any(f"{folder}{slash}{'.'.join(parts[:n])}" in samples for n in range(1, len(parts)))
