"""Perceptual hashes: 64 bits that stay nearly the same when an image is resized or compressed again.

Both see an image through a small grid: the mean brightness of each cell, an integer, computed in integers; where
the native extension is absent, NumPy gives the same. The distance of two images is the number of bits in which
their hashes differ: 0 to 4 for most copies, around 32 for different photographs.
Letters: B images · H W height and width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from florence_fast import native
from florence_fast.data.images import oriented, to_rgb
from florence_fast.data.threads import number_of_threads

log = logging.getLogger(__name__)

ImageLike = np.ndarray | Image.Image

CHUNK = 64  # images that are held in memory at a time
WORTH_THREADS = 2**22  # values in a chunk from which on threads repay their start, about 1 ms of work
LUMA = (299, 587, 114)  # brightness in thousandths, of red, green and blue (ITU-R BT.601)
MARGIN = 3  # of 255, by which dhash wants a cell brighter than the one before
MAX_SIDE, MAX_AREA = 2**24, 2**34  # sums stay below 2**53, which float64 and int64 hold exactly

# The first 8 of the 32 cosines of DCT-II, times 2**14 and rounded: sums of products of integers are exact.
COSINES = np.round(np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)) * 2**14)


class Hashes(NamedTuple):
    """Hashes of the images that could be read, and which those are."""

    hashes: np.ndarray
    """uint64 (N,)."""
    indices: np.ndarray
    """int64 (N,): the number of each hash's image among those given; an unreadable image is missing here."""


def dhash(
    images: ImageLike | Iterable[ImageLike], *, threads: int | None = None, skip_bad: bool = False
) -> np.ndarray | np.uint64 | Hashes:
    """Hash images by where brightness grows from left to right: the difference hash.

    The image is averaged to 8 rows of 9 cells; bit (row, column) is 1 where the next cell to the right is brighter
    by at least 3 of 255. The bits stand row by row, the first of them the most significant. Without that margin a
    plain background, which compression makes uneven, gives bits by chance: of 620 shipped drawings, shrunk and saved
    as JPEG, 61% were found within 3 bits, with it 98%; the margin was chosen on these, of six tried.

    Args:
        images: one image: uint8 (H, W) or (H, W, 3) in RGB, or a PIL image (turned as its EXIF data says, transparent
            parts over white); or several: uint8 (B, H, W, 3), or any iterable of images, of any sizes, taken 64 at a
            time.
        threads: at most one an image; None for torch's number.
        skip_bad: leave out images that cannot be read, and name each in the log.

    Returns:
        uint64, a scalar for one image, (B,) for several; with ``skip_bad`` `Hashes`, which say whose they are.

    Raises:
        TypeError: something is no image.
        ValueError: an image cannot be read, is not uint8, of another shape, empty, or over 2**24 pixels high or wide.
            Among several images, the message gives the number of the bad one, from 0.

    >>> int(dhash(np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1)))) == 2**64 - 1
    True
    """
    return _hash(images, 8, 9, _dhash_bits, threads, skip_bad)


def phash(
    images: ImageLike | Iterable[ImageLike], *, threads: int | None = None, skip_bad: bool = False
) -> np.ndarray | np.uint64 | Hashes:
    """Hash images by their 64 lowest spatial frequencies: the hash of the discrete cosine transform.

    The image is averaged to 32 x 32 cells; of their two-dimensional DCT-II the 8 x 8 lowest coefficients are kept,
    the mean among them, and a bit is 1 where its coefficient is above the median of the 64; the order of the bits is
    dhash's. Half of the bits are 1 in all but very plain images, so distances are even.

    Args, Returns, Raises: those of dhash.

    >>> phash(np.zeros((2, 40, 40, 3), np.uint8)).tolist()
    [0, 0]
    """
    return _hash(images, 32, 32, _phash_bits, threads, skip_bad)


def area_means_reference(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average an image over the cells of a grid: the definition, in NumPy.

    mean = sum of a * (0.299 R + 0.587 G + 0.114 B) / (H / rows * W / columns) over the pixels of a cell, a the
    part of the pixel that lies within; rounded half up.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        rows, columns: of the grid; more than the image has repeat its pixels.

    Returns:
        uint8 (rows, columns).
    """
    height, width = image.shape[:2]
    light, unit = (image @ np.array(LUMA, np.float64), 1000) if image.ndim == 3 else (image.astype(float), 1)
    sums = _overlaps(height, rows) @ light @ _overlaps(width, columns).T  # integers below 2**53
    total = height * width * unit
    return ((2 * sums.astype(np.int64) + total) // (2 * total)).astype(np.uint8)


def _overlaps(pixels: int, cells: int) -> np.ndarray:
    """How much of each cell (rows) lies in each pixel (columns), in units of 1 / cells of a pixel."""
    cell, pixel = np.arange(cells)[:, None] * pixels, np.arange(pixels)[None] * cells
    return np.maximum(np.minimum(cell + pixels, pixel + cells) - np.maximum(cell, pixel), 0).astype(np.float64)


def _dhash_bits(cells: np.ndarray) -> np.ndarray:
    return cells[:, :, 1:] >= cells[:, :, :-1].astype(np.int16) + MARGIN


def _phash_bits(cells: np.ndarray) -> np.ndarray:
    coefficients = (COSINES @ cells.astype(np.float64) @ COSINES.T).reshape(-1, 64)
    middle = np.sort(coefficients, axis=1)[:, 31:33].sum(axis=1, keepdims=True)  # twice the median
    return 2 * coefficients > middle


def _hash(
    images: ImageLike | Iterable[ImageLike],
    rows: int,
    columns: int,
    bits_of: Callable[[np.ndarray], np.ndarray],
    threads: int | None,
    skip_bad: bool,
) -> np.ndarray | np.uint64 | Hashes:
    threads, module = number_of_threads(threads), native.extension()
    single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    if not isinstance(images, Image.Image | np.ndarray | Iterable):
        raise TypeError(f"images must be arrays or PIL images, got {type(images).__name__}")
    listed = [images] if single else images
    remaining = _readable(cast("Iterable[ImageLike]", listed), single, skip_bad)
    hashes, indices = [np.empty(0, np.uint64)], []
    while chunk := list(islice(remaining, CHUNK)):
        numbers, arrays = zip(*chunk, strict=True)
        if module:
            few = sum(array.size for array in arrays) < WORTH_THREADS
            cells = module.area_means(1 if few else threads, list(arrays), rows, columns)
        else:
            cells = np.stack([area_means_reference(array, rows, columns) for array in arrays])
        packed = np.packbits(bits_of(cells).reshape(-1, 64), axis=1)
        hashes.append(packed.view(">u8").ravel().astype(np.uint64))
        indices += numbers
    if skip_bad:
        return Hashes(np.concatenate(hashes), np.array(indices, dtype=np.int64))
    return hashes[1][0] if single else np.concatenate(hashes)


def _readable(images: Iterable[ImageLike], single: bool, skip_bad: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number and the pixels of each image; one that cannot be read is named, or left out and logged."""
    for number, image in enumerate(images):
        name = "the image" if single else f"image {number}"
        try:
            pixels = _pixels(image)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        except (OSError, ValueError) as error:
            if not skip_bad:
                raise ValueError(f"{name} cannot be hashed: {error}") from error
            log.warning("skipped %s: %s", name, error)
        else:
            yield number, pixels


def _pixels(image: ImageLike) -> np.ndarray:
    """Check an image and return its pixels, contiguous, as they are to be seen."""
    if isinstance(image, Image.Image):
        image.load()
        # Copies differ in whether their pixels were turned or only their EXIF data says so.
        upright = oriented(image)
        plain = upright.mode in ("L", "RGB") and "transparency" not in upright.info
        image = np.asarray(upright if plain else to_rgb(upright))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image must be an array or a PIL image, got {type(image).__name__}")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"an image must be uint8 (H, W) or (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    if not height or not width:
        raise ValueError(f"an image must have pixels, got shape {image.shape}")
    if max(height, width) > MAX_SIDE or height * width > MAX_AREA:
        raise ValueError(f"an image must be at most 2**24 pixels high and wide and have 2**34, got {image.shape}")
    return np.ascontiguousarray(image)
