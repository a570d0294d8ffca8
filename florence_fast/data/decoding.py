"""Decode pictures of a source to one size, in this process or ahead of time in others.

Letters: S side of the square pictures.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from florence_fast.data.pairs import PairSource
from florence_fast.data.sampling import CROP, uniform
from florence_fast.data.transforms import fit_shortest, random_crop_box, squash, to_array

CROPS = ("squash", "random_resized", "center")
CHUNK = 16

# A picture as (index, epoch); the epoch is 0 where the picture is the same in all of them.
Key = tuple[int, int]
# What became of it: uint8 (3, S, S), or the reason why it cannot be read.
Decoded = dict[Key, np.ndarray | str]


@dataclass(frozen=True)
class Decoder:
    """Decode pictures of ``source`` to ``size`` x ``size``; the part that a random crop shows follows from its key."""

    source: PairSource
    size: int
    crop: str
    seed: int

    def __call__(self, key: Key) -> np.ndarray | str:
        """Decode one picture, or say why that cannot be done."""
        index, epoch = key
        try:
            image = self.source.image(index)
        except (OSError, ValueError) as error:
            return str(error)
        size = (self.size, self.size)
        if self.crop == "squash":
            return to_array(squash(image, size))
        if self.crop == "center":
            return to_array(fit_shortest(image, size))
        box = random_crop_box(image.width, image.height, uniform(self.seed, CROP, epoch, np.array([index]), 4)[0])
        return to_array(image.resize(size, Image.Resampling.BICUBIC, box=box))


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


class Workers:
    """Decode in other processes, which work on the next batches while this one is used."""

    batches_ahead = 2

    def __init__(self, decoder: Decoder, num_workers: int) -> None:
        # Forked where that exists: scripts need no `if __name__ == "__main__"`, and the source is not copied.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._pool = ProcessPoolExecutor(
            num_workers, multiprocessing.get_context(method), _start_worker, (decoder, os.getpid())
        )

    def start(self, keys: Sequence[Key]) -> Callable[[], Decoded]:
        """Begin to decode ``keys``; calling the result waits for it."""
        chunks = [keys[first : first + CHUNK] for first in range(0, len(keys), CHUNK)]
        futures = [self._pool.submit(_decode_chunk, chunk) for chunk in chunks]

        def wait() -> Decoded:
            try:
                return {key: picture for future in futures for key, picture in future.result().items()}
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a decoding worker died: it was killed, or the machine is out of memory; fewer workers need less"
                ) from error

        return wait

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)


_decoder: Decoder | None = None


def _start_worker(decoder: Decoder, parent: int) -> None:
    """Set up a worker: its decoder, the signals as any process has them, and an end when its parent is gone."""
    global _decoder
    _decoder = decoder
    # A training process that saves on SIGTERM must not pass that habit on to a process with nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after ``parent`` was killed, which tells its children nothing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _decode_chunk(keys: Sequence[Key]) -> Decoded:
    """Decode in a worker."""
    assert _decoder is not None, "_start_worker runs before any chunk"
    return {key: _decoder(key) for key in keys}
