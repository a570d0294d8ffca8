"""JPEG files through simplejpeg where it is installed (the extra ``jpeg``): the same values as Pillow's, sooner."""

import functools
from types import ModuleType

from PIL import Image

MODES = ("RGB", "L")


def decoder_name() -> str:
    """Return the name of the package that decodes JPEG files here: "simplejpeg" or "Pillow"."""
    return "Pillow" if _simplejpeg() is None else "simplejpeg"


def decode(data: bytes, opened: Image.Image) -> Image.Image | None:
    """Decode a JPEG file to RGB.

    Args:
        data: the file.
        opened: the image that Pillow opened from ``data`` and has not decoded.

    Returns:
        An image with the format, the EXIF data and the other facts of ``opened``; None where Pillow has to decode:
        simplejpeg is absent, the file is no JPEG of RGB or grey, or it is damaged, which Pillow says in its own words.
    """
    package = _simplejpeg()
    if package is None or opened.format != "JPEG" or opened.mode not in MODES:
        return None
    try:
        pixels = package.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    if pixels.shape[:2] != (opened.height, opened.width):
        return None
    image = Image.fromarray(pixels)
    image.format, image.info = opened.format, opened.info
    return image


@functools.cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
