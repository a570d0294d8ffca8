"""Labelled images: one folder a class, as ImageNet and torchvision's ImageFolder have it.

Letters: B images of a batch · S side of the images.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from florence_fast.data.folder_walk import files_below
from florence_fast.data.folders import refuse_splits, sort_by_kind
from florence_fast.data.images import MAX_PIXELS, SUFFIXES, open_image
from florence_fast.data.left_out import LeftOut
from florence_fast.data.loader import Collate, ImageBatch, Loader, Slots
from florence_fast.errors import did_you_mean
from florence_fast.printable import printable

logger = logging.getLogger(__name__)


class ClassFolders:
    """All images below a folder; the class of each is the folder directly below it that holds the image.

    Args:
        folder: what is read; links to folders are followed.
        classes: names of the class folders in the order of their numbers; by default those that are there, sorted.

    Raises:
        FileNotFoundError, NotADirectoryError: ``folder`` is not a folder.
        ValueError: there is no image, or one that lies in no class folder; the folders are parts of a data set (train,
            val); there is only one class; a folder is none of ``classes``.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(f"{printable(folder)} does not exist")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{printable(folder)} is not a folder; a folder with one folder a class is wanted")
        self.max_pixels = max_pixels
        left_out = LeftOut()
        self.paths, _ = sort_by_kind(files_below(self.folder, left_out), left_out)
        if not self.paths:
            raise ValueError(f"{printable(folder)} holds no image; known are {', '.join(sorted(SUFFIXES))}")
        names = [self._class_folder(path) for path in self.paths]
        found = sorted(set(names))
        refuse_splits(self.folder, found)
        if classes is None and len(found) < 2:
            raise ValueError(f"{printable(folder)} must hold two class folders or more, got {printable(found[0])}")
        self.classes = tuple(found if classes is None else classes)
        number = {name: index for index, name in enumerate(self.classes)}
        for name in found:
            if name not in number:
                hint = did_you_mean(name, self.classes)
                raise ValueError(f"{printable(folder)}: {printable(name)} is none of the {len(number)} classes{hint}")
        self.labels = [number[name] for name in names]
        logger.info("%s: %d images of %d classes", printable(folder), len(names), len(found))
        if left_out:
            logger.warning("%s: files left out: %s", printable(folder), left_out)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return open_image(self.paths[index], self.max_pixels)

    def describe(self, index: int) -> str:
        """Path of image ``index``."""
        return printable(self.paths[index])

    def _class_folder(self, path: Path) -> str:
        if path.parent == self.folder:
            raise ValueError(f"{printable(path)} lies in no class folder")
        return path.parts[len(self.folder.parts)]


@dataclass(frozen=True, kw_only=True)
class LabelBatch(ImageBatch):
    """Labelled images of one step and rank.

    Args:
        labels: int64 (B,), numbers of classes.
    """

    labels: Tensor


class LabelLoader(Loader):
    """Batches of labelled images from any position on; arguments as for `Loader`.

    >>> batch = next(LabelLoader(ClassFolders("flowers"), batch_size=8, image_size=64).batches(position=0))
    >>> batch.images.shape, batch.labels.shape
    (torch.Size([8, 3, 64, 64]), torch.Size([8]))
    """

    source: ClassFolders

    def read(self, index: int) -> int:
        """Return the class of an image."""
        return self.source.labels[index]

    def collator(self) -> Collate:
        """Return what adds labels to the images of a batch."""
        return _collate


def _collate(slots: Slots, labels: list[int], of_images: dict[str, Any]) -> LabelBatch:
    return LabelBatch(labels=torch.tensor(labels, device="cpu"), **of_images)
