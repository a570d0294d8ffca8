"""Decode images of a source to one size; workers.py does so ahead of time, in other processes.

Letters: S side of the square images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from florence_fast.data.images import ImageSource, to_rgb
from florence_fast.data.resizing import RESIZE_MODES, fit, resize
from florence_fast.data.sampling import CROP, uniform
from florence_fast.data.threads import one_thread_after_fork
from florence_fast.data.transforms import random_crop_box, to_array

# What a loader shows of an image: an evaluation's way of resizing (of which "center" is the older name for "shortest"),
# or a random part.
CROPS = (*RESIZE_MODES, "center", "random_resized")

# An image as (index, epoch); the epoch is 0 where the image is the same in all of them.
Key = tuple[int, int]
# What became of it: uint8 (3, S, S), or the reason why it cannot be read.
Decoded = dict[Key, np.ndarray | str]


@dataclass(frozen=True)
class Decoder:
    """Decode images of ``source`` to ``size`` x ``size``; the part that a random crop shows follows from its key."""

    source: ImageSource
    size: int
    crop: str
    seed: int
    interpolation: str = "bicubic"

    @one_thread_after_fork()
    def __call__(self, key: Key) -> np.ndarray | str:
        """Decode one image, or say why that cannot be done."""
        index, epoch = key
        try:
            image = to_rgb(self.source.image(index))
        except (OSError, ValueError, MemoryError) as error:
            return str(error) or type(error).__name__
        size = (self.size, self.size)
        if self.crop != "random_resized":
            return to_array(fit(image, size, "shortest" if self.crop == "center" else self.crop, self.interpolation))
        box = random_crop_box(image.width, image.height, uniform(self.seed, CROP, epoch, np.array([index]), 4)[0])
        return to_array(resize(image, size, self.interpolation, box))


class Here:
    """Decode in this process, when the result is asked for."""

    batches_ahead = 0

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def start(self, keys: Sequence[Key]) -> Callable[[], Decoded]:
        """Promise to decode ``keys``; calling the promise keeps it."""
        return lambda: {key: self.decoder(key) for key in keys}

    def close(self) -> None:
        """Nothing is held."""
