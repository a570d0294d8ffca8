"""From a PIL image to what a model reads: open_clip's transforms on Pillow and torch alone.

Letters: C channels (3) · H W height and width of the result.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image

from florence_fast.data.images import open_image, to_rgb
from florence_fast.data.resizing import INTERPOLATIONS, RESIZE_MODES, fit, resize
from florence_fast.data.threads import one_thread_after_fork
from florence_fast.errors import unknown

# Of CLIP's training data, and open_clip's default.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

CROP_SCALE = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


def to_array(pixels: np.ndarray) -> np.ndarray:
    """Channels first: uint8 (H, W, 3) as (3, H, W), contiguous."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def random_crop_box(
    width: int,
    height: int,
    draws: Sequence[float],
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> tuple[int, int, int, int]:
    """Choose a part of an image: its share of the area, its proportions and its place, from four given draws.

    Proportions that do not fit at the drawn area are changed to the nearest that do; torchvision draws again.

    Args:
        width, height: of the image, in pixels.
        draws: four numbers in [0, 1): area, proportions (log-uniform), and place across and down.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height.

    Returns:
        (left, top, right, bottom) inside the image, at least one pixel.
    """
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[0])
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws[1])
    aspect = min(max(aspect, area / height**2), width**2 / area)
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    left, top = int((width - w + 1) * draws[2]), int((height - h + 1) * draws[3])
    return left, top, left + w, top + h


@dataclass(frozen=True)
class ImageTransform:
    """An image in, a normalised float tensor (3, H, W) out; see `image_transform`."""

    size: tuple[int, int]
    is_train: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: int = 0
    scale: tuple[float, float] = CROP_SCALE
    ratio: tuple[float, float] = CROP_RATIO

    @one_thread_after_fork()
    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> torch.Tensor:
        """Transform one PIL image of any mode, or the file of one; random crops draw from torch's generator.

        Raises:
            TypeError: it is an array, a tensor or something else.
            ValueError, OSError: the file or image cannot be read.
        """
        image = _rgb_of(image)
        if self.is_train:
            box = random_crop_box(
                image.width, image.height, torch.rand(4, device="cpu").tolist(), self.scale, self.ratio
            )
            pixels_HWC = resize(image, self.size, self.interpolation, box)
        else:
            pixels_HWC = fit(image, self.size, self.resize_mode, self.interpolation, self.fill_color)
        x_CHW = torch.from_numpy(to_array(pixels_HWC)).float().div_(255)
        mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (self.mean, self.std))
        return (x_CHW - mean) / std


def image_transform(
    image_size: int | Sequence[int],
    is_train: bool,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: Mapping[str, Sequence[float]] | None = None,
) -> ImageTransform:
    """Build the transform of a model, with open_clip's arguments and values.

    Values lie within 2 of 255 of those that torchvision gives for PIL images; data/resizing.py says where more.

    Args:
        image_size: side of the result, or (height, width), in pixels.
        is_train: a random crop in place of the whole image.
        mean, std: per channel, in [0, 1]; CLIP's by default.
        resize_mode: for evaluation: "shortest" (cut the middle out), "longest" (show all of it), "squash".
        interpolation: "bicubic" or "bilinear".
        fill_color: grey level 0..255 around an image with "longest".
        aug_cfg: of the random crop: ``scale`` (shares of the area) and ``ratio`` (width over height).

    Returns:
        A callable: PIL image of any mode, or the path of an image file -> float tensor (3, H, W).

    Raises:
        ValueError: a size, a word or a key of ``aug_cfg`` is not one of those above.

    >>> image_transform(224, is_train=False)(Image.new("RGB", (640, 480))).shape
    torch.Size([3, 224, 224])
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size must be a positive int or (height, width), got {image_size!r}")
    for kind, word, known in (
        ("resize_mode", resize_mode, RESIZE_MODES),
        ("interpolation", interpolation, INTERPOLATIONS),
        *(("key of aug_cfg", key, ("scale", "ratio")) for key in aug_cfg or {}),
    ):
        if word is not None and word not in known:
            raise unknown(kind, word, known)
    return ImageTransform(
        size=size,
        is_train=is_train,
        mean=_per_channel("mean", OPENAI_MEAN if mean is None else mean),
        std=_per_channel("std", OPENAI_STD if std is None else std),
        resize_mode=resize_mode or "shortest",
        interpolation=interpolation or "bicubic",
        fill_color=fill_color,
        **{key: cast("tuple[float, float]", tuple(values)) for key, values in (aug_cfg or {}).items()},
    )


def _rgb_of(image: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """Check what was given to a transform, and open or convert it."""
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    got = type(image).__name__
    if isinstance(image, np.ndarray | torch.Tensor):
        got = f"{image.dtype} {got} of shape {tuple(image.shape)}"
    # An array of cv2 is BGR and one of PIL is RGB, a tensor may be normalised already: a guess would be wrong unseen.
    raise TypeError(
        f"image must be a PIL image or the path of an image file, got a {got}: PIL.Image.fromarray makes an image of a "
        "uint8 array (H, W, 3) in RGB"
    )


def _per_channel(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """Three numbers, from one or three."""
    values = (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)
    if len(values) != 3:
        raise ValueError(f"{name} must be one number or three, got {len(values)}")
    return values
