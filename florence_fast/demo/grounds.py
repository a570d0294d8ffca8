"""The demo's second test: drawings of the unseen artist on colours, patterns, a photograph and in a frame.

Training draws none of these: its grounds are random colours, gradients, smooth noise and heaps of random shapes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from florence_fast.data.artists import artists_test
from florence_fast.data.grounds import opacity
from florence_fast.data.pairs import PairSource, PairText, Subset
from florence_fast.evaluate import zero_shot
from florence_fast.evaluate.features import ImageTransform
from florence_fast.models.florence import Florence

NAMES = 40
FRAME_WIDTH = 6
PHOTOGRAPH = Path(__file__).with_name("photograph.webp")
BLUE, RED, CREAM = (44, 95, 222), (214, 46, 52), (250, 236, 205)
GREEN, DARK_GREEN, PINK, PURPLE = (122, 200, 110), (22, 92, 60), (244, 160, 190), (98, 40, 130)


class OnGround(PairSource):
    """Pairs whose images were drawn on white, on another ground.

    Args:
        source: pairs with drawings on white.
        ground: name of one of `GROUNDS`.

    >>> OnGround(artists_test(), "stripes").image(0)
    """

    def __init__(self, source: PairSource, ground: str) -> None:
        self.source, self.ground = source, ground

    def __len__(self) -> int:
        return len(self.source)

    def texts(self, index: int) -> PairText:
        """Texts of pair ``index``."""
        return self.source.texts(index)

    def image(self, index: int) -> Image.Image:
        """Image of pair ``index`` on the ground."""
        return GROUNDS[self.ground](self.source.image(index).convert("RGB"))

    def describe(self, index: int) -> str:
        """Say which pair it is and on which ground."""
        return f"{self.source.describe(index)} ({self.ground})"


def replace_white(image: Image.Image, ground: np.ndarray) -> Image.Image:
    """Put a drawing on white on ``ground``, an array (H, W, 3) or (3,) in 0..255."""
    drawing = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    share = opacity(drawing)[0].permute(1, 2, 0).numpy()
    mixed = np.asarray(image) / 255 + (1 - share) * (np.asarray(ground) / 255 - 1)
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))


def _pattern(first: tuple, second: tuple, which: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    """Return a function that draws on a pattern of two colours; ``which(x, y)`` says where the second is."""

    def draw(image: Image.Image) -> Image.Image:
        y, x = np.mgrid[: image.height, : image.width]
        return replace_white(image, np.where(which(x, y)[..., None], second, first))

    return draw


def _photograph(image: Image.Image) -> Image.Image:
    with Image.open(PHOTOGRAPH) as photograph:
        return replace_white(image, np.asarray(photograph.convert("RGB").resize(image.size)))


def _frame(image: Image.Image) -> Image.Image:
    """Shrink the drawing with its white ground, and put a red frame around it."""
    framed = Image.new("RGB", image.size, RED)
    inside = image.resize((image.width - 2 * FRAME_WIDTH, image.height - 2 * FRAME_WIDTH), Image.Resampling.BICUBIC)
    framed.paste(inside, (FRAME_WIDTH, FRAME_WIDTH))
    return framed


GROUNDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blue": lambda image: replace_white(image, np.array(BLUE)),
    "stripes": _pattern(CREAM, RED, lambda x, y: (x + y) // 6 % 2 == 1),
    "checkerboard": _pattern(GREEN, DARK_GREEN, lambda x, y: (x // 8 + y // 8) % 2 == 1),
    "dots": _pattern(PURPLE, PINK, lambda x, y: (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 12),
    "photograph": _photograph,
    "frame": _frame,
}


def forty_images() -> PairSource:
    """Forty images of the unseen artist with different names, evenly spread over all."""
    test = artists_test()
    return Subset(test, [len(test) * i // NAMES for i in range(NAMES)])


def on_grounds(
    model: Florence,
    tokenizer: Any,
    *,
    transform: ImageTransform | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Measure how often the right one of forty names comes first, on white and on each of `GROUNDS`.

    Returns:
        Shares of 40 images: "white", one for each ground, and "mean", that of the grounds without white.
    """
    test = forty_images()
    names = [test.texts(index).text for index in range(len(test))]
    sources = {"white": test, **{ground: OnGround(test, ground) for ground in GROUNDS}}
    shares = {
        ground: zero_shot(model, tokenizer, source, names, transform=transform, precision=precision)["top1"]
        for ground, source in sources.items()
    }
    return {**shares, "mean": sum(shares[ground] for ground in GROUNDS) / len(GROUNDS)}
