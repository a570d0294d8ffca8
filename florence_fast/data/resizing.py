"""Resize RGB images to one size, with antialiasing: torch's kernel for 8 bits, and Pillow's for extreme proportions.

A JPEG is brought to 224 x 224 at 1.3 to 1.7 times Pillow's speed, decoding included (bench/results/decoding.json, one
thread with AVX2). Both compute the same filter in integers, so a value differs by at most 2 of 255 (each of the two
passes rounds), or by a few more where overshoot at a sharp edge is cut off between the passes: which of these comes
first also differs between Pillow's own releases.
Letters: H W height and width of the result.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "longest", "squash")
MAX_BETWEEN = 2**24  # pixels between the two passes, of which torch's first is always the one across

Box = tuple[float, float, float, float]


def fit(image: Image.Image, size: tuple[int, int], resize_mode: str, interpolation: str, fill: int = 0) -> np.ndarray:
    """Bring an RGB image to (H, W) in one of the `RESIZE_MODES`: uint8 (H, W, 3).

    Args:
        image: an RGB image.
        size: (H, W).
        resize_mode: "squash": whatever the proportions. "shortest": so that (H, W) is just covered, of which the middle
            is cut out. "longest": so that all of it just fits, in the middle of a canvas of one grey.
        interpolation: "bicubic" or "bilinear".
        fill: grey level of the canvas, 0..255.
    """
    height, width = size
    if resize_mode == "squash":
        return resize(image, size, interpolation)
    if resize_mode == "longest":
        scale = min(height / image.height, width / image.width)
        scaled = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        top, left = (height - scaled[0]) // 2, (width - scaled[1]) // 2
        canvas = np.full((height, width, 3), fill, np.uint8)
        canvas[top : top + scaled[0], left : left + scaled[1]] = resize(image, scaled, interpolation)
        return canvas
    return _fit_shortest(image, size, interpolation)


def _fit_shortest(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    height, width = size
    if image.width * height <= image.height * width:
        scaled = int(width * image.height / image.width), width
    else:
        scaled = height, int(height * image.width / image.height)
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    if scaled[0] * scaled[1] <= MAX_BETWEEN:
        return resize(image, scaled, interpolation)[top : top + height, left : left + width]
    # Of a very long image only the middle is resized.
    down, across = image.height / scaled[0], image.width / scaled[1]
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return _resize_by_pillow(image, size, interpolation, (left * across, top * down, right, bottom))


def resize(
    image: Image.Image, size: tuple[int, int], interpolation: str, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Cut ``box`` (left, top, right, bottom) out of an RGB image and resize it to (H, W): uint8 (H, W, 3)."""
    if box is not None and box != (0, 0, image.width, image.height):
        image = image.crop(box)
    if image.size == size[::-1]:
        return np.array(image)
    if image.height * size[1] > MAX_BETWEEN:
        return _resize_by_pillow(image, size, interpolation, (0, 0, image.width, image.height))
    pixels_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized_1CHW = F.interpolate(pixels_1CHW, size, mode=interpolation, antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _resize_by_pillow(image: Image.Image, size: tuple[int, int], interpolation: str, box: Box) -> np.ndarray:
    """Resize ``box`` to (H, W) in little memory: downwards first where fewer pixels lie between the passes then.

    Older Pillows resize across first: 1 x 1,000,000 pixels would become 224 x 1,000,000 before they shrink.
    """
    (height, width), resample = size, INTERPOLATIONS[interpolation]
    left, top, right, bottom = box
    if width * (bottom - top) > max(MAX_BETWEEN, height * (right - left)):
        image = image.resize((image.width, height), resample, box=(0, top, image.width, bottom))
        top, bottom = 0, height
    return np.array(image.resize((width, height), resample, box=(left, top, right, bottom)))
