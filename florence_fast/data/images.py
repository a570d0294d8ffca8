"""Open images that strangers made: known formats only, a limit on their size, and always plain RGB."""

import errno
import io
import os
import stat
import warnings
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from florence_fast.data import jpeg

# Pillow's own limit; its warning from here on counts as an error. To allow more, raise both this and Pillow's.
MAX_PIXELS = 89_478_485

MAX_FILE_BYTES = 2**30  # an image of MAX_PIXELS takes less, even uncompressed with four channels of 16 bits
LARGEST_FLOAT = 1e30  # of a grey value; rasters mark missing ones by the lowest float there is

# Formats of photographs and drawings. Pillow also knows some that run other programs (PostScript): not these.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


class ImageSource(Protocol):
    """Whatever holds images by number."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str: ...


def open_image(file: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB, transparent parts over white; `to_rgb` says what becomes of each mode.

    Args:
        file: a path, or the bytes of the file.
        max_pixels: width times height above which the image is refused before it is decoded.

    Returns:
        The decoded RGB image, its first frame if it moves. It is not turned by its EXIF data (as in CLIP).

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: it is no regular file (but a pipe or a device), or over 1 GiB; it is no image of a known format, is
            damaged or cut short, or has too many pixels.

    >>> open_image("cat.png").mode
    'RGB'
    """
    name = "image" if isinstance(file, bytes) else str(file)
    data = file if isinstance(file, bytes) else _read_regular_file(file)
    if not data:
        raise ValueError(f"cannot read {name}: it is empty, 0 bytes")
    # Decoders meet hostile bytes with every kind of exception; to the caller they all mean the same.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
        return jpeg.decode(data, image) or to_rgb(image)
    except UnidentifiedImageError as error:  # whose own words name our buffer
        raise ValueError(f"cannot read {name}: cannot identify image file") from error
    except Exception as error:
        raise ValueError(f"cannot read {name}: {str(error) or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    - Transparency is laid over white.
    - ``I;16`` (grey of 16 bits): the upper 8 bits.
    - ``I`` (grey integers of 32 bits): from a PNG or PGM file, which hold 16 bits, the upper 8 of these. From others it
      depends on the values: within 0..255 they are kept; within 0..65535 they are taken as 16 bits; else the smallest
      becomes black and the largest white.
    - ``F`` (grey floats): within 0..1 they are multiplied by 255; beyond as ``I``. What marks missing values, NaN,
      infinities and magnitudes over 1e30, becomes black and does not count.
    - All other modes: as ``Image.convert`` does.

    Raises:
        ValueError, OSError: the image is cut short, or Pillow has no conversion from its mode.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        return _with_exif(Image.fromarray(_to_8_bits(np.asarray(image), sixteen_bits)).convert("RGB"), image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return _with_exif(white.convert("RGB"), image)
    return image.convert("RGB")


def oriented(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data says; without such data, or where it is damaged, return it as it is."""
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image
    except Exception:
        return image


def _to_8_bits(values: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Grey values of any number type as uint8; the rule is in `to_rgb`."""
    if sixteen_bits:
        return (values >> 8).astype(np.uint8)
    finite = np.abs(values) <= LARGEST_FLOAT
    used = values[finite] if finite.any() else np.zeros(1)
    low, high = float(used.min()), float(used.max())
    if low >= 0 and high <= 65535:
        if high > 255:
            return (np.where(finite, values, 0).astype(np.uint16) >> 8).astype(np.uint8)
        low, scale = 0.0, 255.0 if high <= 1 and values.dtype.kind == "f" else 1.0
    else:
        scale = 255 / (high - low) if high > low else 0.0
    return np.rint((np.where(finite, values, low) - low) * scale).astype(np.uint8)


def _with_exif(converted: Image.Image, original: Image.Image) -> Image.Image:
    """Keep what says how an image is to be turned, which conversions by way of an array lose."""
    if "exif" in original.info:
        converted.info["exif"] = original.info["exif"]
    return converted


def _read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """Read a whole file; a pipe or device, of which there may be no end, is refused before it is opened."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such image file", os.fspath(path)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, socket or device"
        raise ValueError(f"cannot read {path}: an image file was wanted, got a {kind}")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"cannot read {path}: its {found.st_size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}"
        )
    with open(path, "rb") as file:
        return file.read(MAX_FILE_BYTES)
