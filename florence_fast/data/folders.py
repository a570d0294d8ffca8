"""Pairs that lie in a folder: each image with a text file of its name, or in the folder of its class."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from florence_fast.data.folder_walk import files_below
from florence_fast.data.imagenet import imagenet_name, is_wnid
from florence_fast.data.images import SUFFIXES, open_image
from florence_fast.data.left_out import LeftOut
from florence_fast.data.pairs import PairSource, PairText, pair_text
from florence_fast.printable import printable
from florence_fast.text_files import read_text

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 1 << 20
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|eval)([-_ ]?(set|split|data|images?|imgs))?([-_ ]?\d+)?",
    re.IGNORECASE,
)


class FolderPairs(PairSource):
    """All images below a folder, sorted by path; links to folders are followed.

    The text of ``NAME.jpg`` is ``NAME.txt`` where that exists, and otherwise the name of the image's folder
    directly below the root, with blanks for its ``_`` and ``-``: ``red_apple/17.jpg`` is a "red apple". A folder that
    is named by a WordNet id has the name of that ImageNet class. What is read, and what is left out, is logged.

    Raises:
        ValueError: there is no image, or none of them has a text; the folders are parts of a data set (``train``,
            ``val``) in place of classes; one is a WordNet id that is no class of ImageNet's 1,000.
    """

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        left_out = LeftOut()
        self.images, self._captions = sort_by_kind(files_below(folder, left_out), left_out)
        if not self.images:
            held = f"; it holds {left_out}" if left_out else ""
            raise ValueError(f"{printable(folder)} holds no image; known are {', '.join(sorted(SUFFIXES))}{held}")
        unnamed = self.images
        if self._captions:
            unnamed = [path for path in unnamed if path.with_suffix("") not in self._captions]
        if len(unnamed) == len(self.images) and all(path.parent == folder for path in unnamed):
            raise ValueError(
                f"none of the {len(self.images)} images in {printable(folder)} has a text: wanted NAME.txt beside "
                "NAME.jpg, or the images of a class in a folder of its name"
            )
        classes = sorted({self._class_folder(path) for path in unnamed if path.parent != folder})
        self._refuse_what_is_no_class(classes)
        self._tell(classes, len(unnamed), left_out)

    def __len__(self) -> int:
        return len(self.images)

    def texts(self, index: int) -> PairText:
        """Text of image ``index``."""
        path = self.images[index]
        if caption := self._captions.get(path.with_suffix("")):
            return pair_text(read_text(caption, MAX_TEXT_BYTES))
        if path.parent == self.folder:
            raise ValueError(f"no {printable(path.stem)}.txt beside it")
        return pair_text(_class_name(self._class_folder(path)))

    def image(self, index: int) -> Image.Image:
        """Image ``index``."""
        return open_image(self.images[index], self.max_pixels)

    def describe(self, index: int) -> str:
        """Path of image ``index``."""
        return printable(self.images[index])

    def _class_folder(self, path: Path) -> str:
        return path.parts[len(self.folder.parts)]

    def _refuse_what_is_no_class(self, classes: list[str]) -> None:
        refuse_splits(self.folder, classes)
        unknown = [name for name in classes if is_wnid(name) and imagenet_name(name) is None]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the {len(classes)} class folders in {printable(self.folder)} are WordNet ids that "
                f"are none of ImageNet's 1,000 classes (the first: {unknown[0]}): give the folders names"
            )

    def _tell(self, classes: list[str], num_unnamed: int, left_out: LeftOut) -> None:
        """Log what was understood; a warning where that may not be what was meant."""
        names = [printable(_class_name(name), 40) for name in classes]
        logger.log(
            logging.WARNING if len(names) == 1 and num_unnamed == len(self.images) else logging.INFO,
            "%s: %d images, %d with a text of their own, the others of %d classes by the names of their folders%s",
            *(printable(self.folder), len(self.images), len(self.images) - num_unnamed, len(names)),
            f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "",
        )
        if left_out:
            logger.warning("%s: files left out: %s", printable(self.folder), left_out)


def refuse_splits(folder: Path, classes: Sequence[str]) -> None:
    """Refuse class folders that are parts of a data set (train, val) instead.

    Raises:
        ValueError: the message names them.
    """
    parts = [name for name in classes if _SPLIT.fullmatch(name)]
    training = [name for name in parts if name.lower().startswith("train")]
    others = [name for name in parts if name.lower().startswith(("val", "dev"))]
    if (parts and len(parts) == len(classes)) or (training and others):
        raise ValueError(
            f"{printable(folder)} holds parts of a data set in place of classes: {', '.join(parts)}; give one "
            f"of them: {printable(folder / [*training, *parts][0])}"
        )


def sort_by_kind(files: Iterable[Path], left_out: LeftOut) -> tuple[list[Path], dict[Path, Path]]:
    """Part files into images and, by their path without suffix, texts; count the others."""
    images, captions = [], {}
    for path in files:
        if path.suffix.lower() in SUFFIXES:
            images.append(path)
        elif path.suffix.lower() == ".txt":
            stem = path.with_suffix("")
            if stem not in captions or path.suffix == ".txt":
                captions[stem] = path
        else:
            left_out.add(
                f"of kind {printable(path.suffix.lower(), 20)}" if path.suffix else "without a suffix", path.name
            )
    if captions:
        left_out.add("texts without an image", *sorted(captions.keys() - {path.with_suffix("") for path in images}))
    return images, captions


def _class_name(folder: str) -> str:
    """The name of a class, from that of its folder."""
    return imagenet_name(folder) or " ".join(folder.replace("_", " ").replace("-", " ").split())
