"""Images with texts, whatever they lie in: one map-style source, and one function that opens it.

A source is indexed once, before the first step, and then answers for any index in any order: the order of a run
can depend on its seed alone. What is wrong with a single pair shows when it is asked for, as a ``ValueError`` or
``OSError``, so that a loader can count it, name it and go on.
"""

import difflib
import glob
import logging
import os
import reprlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from PIL import Image

from florence_fast.data.images import MAX_PIXELS, open_image
from florence_fast.printable import has_half_character, printable
from florence_fast.strict_json import BYTE_ORDER_MARK

__all__ = ["Concat", "PairSource", "PairText", "Subset", "open_image", "open_pairs"]

logger = logging.getLogger(__name__)

# A longer text is no caption, and normalising one of many accents takes time that grows with its square.
MAX_TEXT = 10_000
REMOTE = ("http://", "https://", "s3://", "gs://", "hf://", "ftp://", "pipe:", "-")


@dataclass(frozen=True, slots=True)
class PairText:
    """What is said about one image: its text and, where the data has them, a short name and keywords."""

    text: str
    short_name: str | None = None
    keywords: list[str] = field(default_factory=list)


def pair_text(text: object, short_name: object = None, keywords: object = None) -> PairText:
    """Build the texts of a pair from what a file holds.

    Blanks and byte-order marks at both ends are no part of a text, and blank keywords are left out.

    Raises:
        ValueError: a text is missing, is no string, has more than 10,000 characters, or holds a lone surrogate (half
            an emoji, or a name that is not UTF-8), which cannot be encoded.
    """
    if short_name is not None and not isinstance(short_name, str):
        raise ValueError(f"short_name must be a string, got {reprlib.repr(short_name)}")
    words = [] if keywords is None else keywords
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"keywords must be a list of strings, got {reprlib.repr(keywords)}")
    names = [clean_text(word, "keyword") for word in words if word.strip()]
    return PairText(clean_text(text), clean_text(short_name, "short name") if short_name else None, names)


def clean_text(text: object, what: str = "text") -> str:
    """Return ``text`` without blanks and byte-order marks at its ends; raise ValueError as `pair_text` does."""
    if not isinstance(text, str) or not (text := text.strip().strip(BYTE_ORDER_MARK).strip()):
        raise ValueError(f"it has no {what}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {what} has {len(text):,} characters, more than the limit of {MAX_TEXT:,}")
    if has_half_character(text):
        raise ValueError(f"the {what} holds half a character (a lone surrogate): {printable(text, 80)}")
    return text


class PairSource(ABC):
    """Image-text pairs by index; reading is free of state, so processes may share a source."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs, the unreadable ones included."""

    @abstractmethod
    def texts(self, index: int) -> PairText:
        """Return the texts of pair ``index``, or raise ValueError or OSError where they cannot be read."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Decode the image of pair ``index`` to RGB, or raise ValueError or OSError where it cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Say where pair ``index`` lies, for messages: a file and a row, or a shard and a key."""


class Subset(PairSource):
    """Some pairs of a source, in the order given."""

    def __init__(self, source: PairSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def texts(self, index: int) -> PairText:
        """Texts of the chosen pair ``index``."""
        return self.source.texts(self.indices[index])

    def image(self, index: int) -> Image.Image:
        """Image of the chosen pair ``index``."""
        return self.source.image(self.indices[index])

    def describe(self, index: int) -> str:
        """Where the chosen pair ``index`` lies."""
        return self.source.describe(self.indices[index])


class Concat(PairSource):
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = list(sources)
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[PairSource, int]:
        number = bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)

    def texts(self, index: int) -> PairText:
        """Texts of pair ``index`` of them all."""
        source, index = self._locate(index)
        return source.texts(index)

    def image(self, index: int) -> Image.Image:
        """Image of pair ``index`` of them all."""
        source, index = self._locate(index)
        return source.image(index)

    def describe(self, index: int) -> str:
        """Where pair ``index`` of them all lies."""
        source, index = self._locate(index)
        return source.describe(index)


def open_pairs(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    img_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PairSource:
    """Open image-text pairs; what they are read by follows from what the path is.

    - ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``: a row a pair, paths of images relative to the table (or the
      working folder). Parquet may hold the images themselves, as bytes or as {"bytes", "path"} (Hugging Face).
    - a folder: images with a ``.txt`` of the same name beside them, or in one folder a class; or a folder of tars.
    - ``.tar``, ``.tar.gz``: WebDataset shards, ``KEY.jpg`` (or png, webp) with ``KEY.txt`` and, or, ``KEY.json``.

    Only local files are read. Remote and piped shards, which have no order that could be resumed, are refused.

    Args:
        spec: a path, several, or one with braces for shards: ``data/{000..010}.tar``, ``{train,val}.csv``, or with
            ``*``, ``?`` or ``[abc]``, sorted: ``part-*.csv``; ``::`` joins paths, as in open_clip.
        img_key: column of the image's path, in tables; ``image`` is understood too.
        caption_key: column of the text, in tables; ``text`` is understood too.
        separator: between the columns of a CSV file, as a character or as "tab", "comma", "semicolon", "pipe" or
            "space"; by default the one that the header shows.
        max_pixels: images larger than this are unreadable.

    Raises:
        FileNotFoundError: a path does not exist; the message names the nearest one that does.
        ValueError: a file holds no pair, has no such column, or is of no known kind; ``separator`` is none.
        ImportError: a ``.parquet`` file needs the extra "parquet", which is not installed.

    >>> open_pairs("captions.tsv", img_key="path", caption_key="caption")
    """
    from florence_fast.data.csv_records import parse_separator
    from florence_fast.data.shards import TarPairs, expand_braces, is_tar
    from florence_fast.data.tables import SUFFIXES, TablePairs, is_table

    specs = [os.fsdecode(item) for item in ([spec] if isinstance(spec, str | bytes | os.PathLike) else spec)]
    separator = parse_separator(separator)
    _refuse_remote(specs)
    written = [path for item in specs for joined in item.split("::") for path in expand_braces(joined)]
    paths = [path for item in written for path in _expand_glob(item)]
    if not paths:
        raise ValueError("spec must name at least one file or folder of image-text pairs, got none")
    _check_present(paths)
    if all(is_tar(path) and not path.is_dir() for path in paths):
        return TarPairs(paths, max_pixels=max_pixels)
    sources: list[PairSource] = []
    for path in paths:
        if path.is_dir():
            sources.append(_open_folder(path, max_pixels))
        elif is_tar(path):
            sources.append(TarPairs([path], max_pixels=max_pixels))
        elif is_table(path):
            sources.append(TablePairs.read(path, img_key, caption_key, separator, max_pixels))
        else:
            raise ValueError(
                f"cannot tell how to read {printable(path)}: wanted a folder, {', '.join(SUFFIXES)}, .tar or .tar.gz"
            )
    return sources[0] if len(sources) == 1 else Concat(sources)


def _expand_glob(spec: str) -> list[Path]:
    """The files that a pattern stands for, sorted; a path that exists, or that is no pattern, stands for itself."""
    if not glob.has_magic(spec) or os.path.exists(spec):
        return [Path(spec)]
    found = sorted(glob.glob(spec, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {spec!r}")
    return [Path(path) for path in found]


def _open_folder(folder: Path, max_pixels: int) -> PairSource:
    from florence_fast.data.folders import FolderPairs
    from florence_fast.data.shards import TarPairs, is_tar

    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    tars = [path for path in entries if is_tar(path) and path.is_file()]
    if not tars:
        return FolderPairs(folder, max_pixels=max_pixels)
    if others := sorted(set(entries) - set(tars)):
        logger.warning(
            "%s: read as %d shards; %d other files and folders in it are left out (%s%s)",
            *(printable(folder), len(tars), len(others), printable(others[0].name), ", ..." if others[1:] else ""),
        )
    return TarPairs(tars, max_pixels=max_pixels)


def _refuse_remote(specs: Sequence[str]) -> None:
    for spec in specs:
        for part in spec.split("::"):
            if part.startswith(REMOTE):
                raise ValueError(
                    f"only local files are read, got {part!r}: remote and piped shards cannot be resumed in order; "
                    "copy them to a local folder first"
                )


def _check_present(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.exists()]
    if missing:
        first = missing[0]
        beside = [path.name for path in first.parent.iterdir()] if first.parent.is_dir() else []
        near = difflib.get_close_matches(first.name, beside, n=1)
        hint = f" (did you mean {str(first.parent / near[0])!r}?)" if near else ""
        more = f", nor do {len(missing) - 1} more of {len(paths)}" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{printable(first)} does not exist{more}{hint}")
    special = [path for path in paths if not path.is_file() and not path.is_dir()]
    if special:
        raise ValueError(f"{printable(special[0])} is neither a file nor a folder but a pipe, a socket or a device")
