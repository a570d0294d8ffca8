"""Search in a folder of images by words: encode the images once, rank them by any text."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from florence_fast.data.folder_walk import files_below
from florence_fast.data.folders import sort_by_kind
from florence_fast.data.images import SUFFIXES, open_image
from florence_fast.data.left_out import LeftOut
from florence_fast.data.loader import BadDataError
from florence_fast.data.pairs import PairSource, Subset
from florence_fast.evaluate import feature_file
from florence_fast.evaluate.features import ImageTransform, encode_images, encode_texts
from florence_fast.models.florence import Florence
from florence_fast.printable import printable

logger = logging.getLogger(__name__)


class Hit(NamedTuple):
    """One answer of a search: the image and its cosine with the query, from -1 to 1."""

    path: Path
    score: float


class Hits(list[Hit]):
    """The answers of one search, best first; a notebook shows the images."""

    def __init__(self, hits: Iterable[Hit] = (), query: str = "") -> None:
        super().__init__(hits)
        self.query = query

    def _repr_html_(self) -> str:
        from florence_fast.evaluate.contact_sheet import figures

        return figures(self.query, self)


class ImageFolder:
    """The images below a folder, in the order of their paths; links are followed, hidden files are left out.

    Raises:
        FileNotFoundError: The folder does not exist.
        NotADirectoryError: It is a file.
        ValueError: It holds no image.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(f"no such folder: {self.folder}")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"a folder of images was wanted, got a file: {self.folder}")
        left_out = LeftOut()
        self.paths, _ = sort_by_kind(files_below(self.folder, left_out), left_out)
        if not self.paths:
            held = f"; it holds {left_out}" if left_out else ""
            raise ValueError(f"no images ({', '.join(sorted(SUFFIXES))}) in {self.folder}{held}")
        if left_out:
            logger.warning("%s: left out: %s", printable(self.folder), left_out)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Open image ``index`` as RGB."""
        return open_image(self.paths[index])

    def describe(self, index: int) -> str:
        """Where image ``index`` lies."""
        return printable(self.paths[index])


@dataclass(frozen=True)
class ImageIndex:
    """Images that were encoded once and can be asked for any number of times."""

    paths: Sequence[Path]
    features: Tensor
    """(N, D) of length 1, row i belongs to ``paths[i]``."""

    def search(self, query_features: Tensor, top: int = 10) -> Hits:
        """Return the ``top`` images nearest to one encoded query of shape (D,), best first, ties by path."""
        scores = self.features @ query_features
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        return Hits(Hit(self.paths[row], scores[row].item()) for row in order)


def index_images(
    model: Florence,
    images: ImageFolder | str | os.PathLike[str],
    *,
    transform: ImageTransform | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    progress: bool = False,
    file: str | os.PathLike[str] | None = None,
) -> ImageIndex:
    """Encode every readable image of a folder; the others are named in the log.

    Args:
        model: A dual encoder.
        images: The folder.
        transform: From a PIL image to a tensor; by default the model's own evaluation transform.
        batch_size: Images in one forward pass.
        precision: As in ``encode_images``.
        progress: Show a progress bar.
        file: Keep the features here, and encode only images that are new or whose modification time or size has
            changed since. Features of another model, or at another precision, are computed anew.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: As ``ImageFolder``.
        ValueError: ``file`` is something else than an index, or is given with a ``transform``.
        BadDataError: No image can be read.

    >>> index = index_images(model, "holiday")
    >>> search(model, tokenizer, index, "a dog on a beach")[0].path
    """
    images = images if isinstance(images, ImageFolder) else ImageFolder(images)
    if file is not None and transform is not None:
        raise ValueError("an index in a file is made with the model's own transform: leave out transform or file")

    def encode(numbers: list[int]) -> tuple[list[int], Tensor]:
        part = Subset(cast(PairSource, images), numbers)
        try:
            found = encode_images(
                model,
                part,
                transform,
                batch_size=batch_size,
                precision=precision,
                max_bad_share=1.0,
                progress=progress,
            )
        except BadDataError:
            if len(part) == len(images):
                raise
            return [], torch.empty(0)  # those that the file knows are left
        return [numbers[row] for row in found.indices], found.features

    if file is None:
        numbers, features = encode(list(range(len(images))))
    else:
        wanted = feature_file.stamps(images.paths, images.folder)
        key = feature_file.model_digest(model, precision)
        numbers, features = feature_file.with_file(Path(file), key, wanted, encode)
    return ImageIndex([images.paths[number] for number in numbers], features)


def search(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    index: ImageIndex,
    query: str,
    top: int = 10,
) -> Hits:
    """Rank the images of ``index`` by how near they are to the words of ``query``, best first."""
    hits = index.search(encode_texts(model, tokenizer, [query])[0], top)
    return Hits(hits, query)
