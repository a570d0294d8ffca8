"""Open pictures that strangers made: known formats only, a limit on their size, and always plain RGB."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# Pillow's own limit; its warning from here on counts as an error. To allow more, raise both this and Pillow's.
MAX_PIXELS = 89_478_485

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


def open_picture(file: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, transparent parts over white.

    Args:
        file: a path, or the bytes of the file.
        max_pixels: width times height above which the picture is refused before it is decoded.

    Returns:
        The decoded RGB image, its first frame if it moves. It is not turned by its EXIF data (as in CLIP).

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: it is no picture of a known format, is damaged or cut short, or has too many pixels.

    >>> open_picture("cat.png").mode
    'RGB'
    """
    name = "picture" if isinstance(file, bytes) else str(file)
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    # Decoders meet hostile bytes with every kind of exception; to the caller they all mean the same.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
        return to_rgb(image)
    except Exception as error:
        raise ValueError(f"cannot read {name}: {str(error) or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to RGB: transparency is laid over white, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
