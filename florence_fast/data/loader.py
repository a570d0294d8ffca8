"""Batches of images for training, in an order that depends on seed, epoch and position alone.

The samples of a run form one endless sequence: epoch after epoch, each a permutation drawn from (seed, epoch). A
position counts the samples that all ranks have consumed; the batches from a position on are the same for every
number of workers, and the ranks' parts join to the same global batch, so a run resumes by skipping to its position.

Letters: B samples of a batch · S side of the images.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from florence_fast.data.decoding import CROPS, Decoded, Decoder, Here, Key
from florence_fast.data.images import ImageSource
from florence_fast.data.picture_cache import PictureCache, fits_in_memory, shrink
from florence_fast.data.resizing import INTERPOLATIONS
from florence_fast.data.sampling import epoch_order
from florence_fast.data.workers import Workers
from florence_fast.errors import unknown
from florence_fast.printable import printable
from florence_fast.ranges import annotated

logger = logging.getLogger(__name__)

# The share of unreadable samples is judged from this many samples on.
JUDGED_AFTER = 200
NAMED_IN_ERROR = 5
NAMED_IN_BATCH = 4
WORKER_TIMEOUT = 300.0  # seconds; longer than a network drive needs to come back


# Begins to decode some images, and returns the call that waits for them.
Start = Callable[[Sequence[Key]], Callable[[], Decoded]]


class BadDataError(RuntimeError):
    """More samples are unreadable than a run may skip."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one step and rank.

    Args:
        images: uint8 (B, 3, S, S).
        indices: int64 (B,), the samples' numbers in the source.
        skipped: how many of the B stand in for an unreadable sample.
        source: where the indices belong to, which names them in messages.
    """

    images: Tensor
    indices: Tensor
    skipped: int
    source: ImageSource | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """Name the first samples, for messages: their numbers, and where each lies."""
        first = self.indices[:NAMED_IN_BATCH].tolist()
        if self.source is None:
            return str(first)
        return ", ".join(f"{index} ({printable(self.source.describe(index))})" for index in first)


class Slots(NamedTuple):
    """Where the samples of a batch come from: places in the sequence, their epochs and indices, (B,) each."""

    positions: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray


# Joins a batch from slots, what belongs to their images, and the fields of `ImageBatch`.
Collate = Callable[[Slots, list[Any], dict[str, Any]], Any]


class Loader(ABC):
    """Batches of a source from any position on; a subclass says what belongs to an image, and joins a batch.

    Args:
        source: the images.
        batch_size: samples a batch and rank, B.
        image_size: side S of the images. They are decoded at the largest size asked for so far and averaged down.
        seed: of the order and of all draws.
        cache: decode each image once and keep it as uint8, where half of the memory holds them all. A random crop
            differs from epoch to epoch and is always decoded anew.
        num_workers: processes that decode ahead, each on one thread; 0 decodes in this one.
        worker_timeout: seconds without any finished sample after which a `WorkerError` names those that the workers
            are on.
        rank, world_size: which part of each global batch of ``batch_size * world_size`` samples is ours.
        max_bad_share: largest share of unreadable samples that is skipped, judged after 200 samples.
        crop: "shortest" (the middle of the image), "longest" (all of it, on a canvas), "squash" (all of it, stretched
            to a square) or "random_resized" (a part of it, drawn from (seed, epoch, index)).
        interpolation: "bicubic" or "bilinear".

    Raises:
        ValueError: the source is empty, or an argument is out of its range.
    """

    kind = "image"
    """What a sample is called in messages."""

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        cache: bool = True,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
        rank: int = 0,
        world_size: int = 1,
        max_bad_share: float = 0.01,
        crop: str = "shortest",
        interpolation: str = "bicubic",
    ) -> None:
        if len(source) == 0:
            raise ValueError(f"source must hold at least one {self.kind}, got none")
        if crop not in CROPS:
            raise unknown("crop", crop, CROPS)
        if interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", interpolation, INTERPOLATIONS)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
        require_positive(batch_size=batch_size, image_size=image_size)
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if not 0 < worker_timeout < math.inf:
            raise ValueError(f"worker_timeout must be a positive number of seconds, got {worker_timeout}")
        require_share(max_bad_share=max_bad_share)
        self.source, self.seed, self.crop, self.interpolation = source, seed, crop, interpolation
        self.batch_size, self.image_size = batch_size, image_size
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.rank, self.world_size = rank, world_size
        self.max_bad_share, self.cache = max_bad_share, cache and crop != "random_resized"
        self.samples_seen = self.samples_bad = 0
        self._faults: dict[int, str] = {}
        self._notes: dict[int, Any] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._set_decode_size(image_size)

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return what belongs to image ``index``, or raise ValueError or OSError where it cannot be read."""

    @abstractmethod
    def collator(self) -> Collate:
        """Return what joins a batch, as it is set now."""

    def configure(self, *, batch_size: int | None = None, image_size: int | None = None) -> None:
        """Change what a new stage of training changes; it holds from the next call of `batches` on."""
        require_positive(batch_size=batch_size, image_size=image_size)
        self.batch_size = batch_size or self.batch_size
        self.image_size = image_size or self.image_size
        if self.image_size > self._decode_size:
            self._set_decode_size(self.image_size)

    def batches(self, position: int, stopping: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """Yield this rank's batches without end, from ``position`` on.

        Args:
            position: samples that all ranks together have consumed before.
            stopping: whether the run has been asked to stop. While it is true, workers that make no progress are
                waited for 10 seconds only, so that a run with a stuck worker can still save and end.

        Raises:
            ValueError: ``position`` is negative.
            BadDataError: too many samples are unreadable; the message counts them and names the first.
            WorkerError: a worker process died, or none of them makes progress; the message names their samples.
        """
        if position < 0:
            raise ValueError(f"position must not be negative, got {position}")
        return self._batches(position, stopping)

    def _batches(self, position: int, stopping: Callable[[], bool]) -> Iterator[Any]:
        decoder = Decoder(self.source, self._decode_size, self.crop, self.seed, self.interpolation)
        workers = self.num_workers
        decoding = Workers(decoder, workers, self.worker_timeout, stopping) if workers else Here(decoder)
        batch_size, image_size, collate = self.batch_size, self.image_size, self.collator()
        ahead = deque()
        try:
            while True:
                while len(ahead) <= decoding.batches_ahead:
                    start = position + self.rank * batch_size
                    slots = self._slots(np.arange(start, start + batch_size))
                    ahead.append((slots, annotated("data.decode")(decoding.start(self._to_decode(slots)))))
                    position += batch_size * self.world_size
                slots, finish = ahead.popleft()
                yield self._assemble(slots, finish(), decoding.start, image_size, collate)
        finally:
            decoding.close()

    def _slots(self, positions: np.ndarray) -> Slots:
        """Look up places of the sequence of samples."""
        epochs, places = np.divmod(positions, len(self.source))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        return Slots(positions, epochs, indices)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of one epoch; those of its neighbours are kept too."""
        if epoch not in self._orders:
            self._orders = {other: order for other, order in self._orders.items() if abs(other - epoch) <= 1}
            self._orders[epoch] = self.order(epoch)
        return self._orders[epoch]

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of one epoch: int64, a permutation of the source."""
        return epoch_order(self.seed, epoch, len(self.source))

    def _key(self, index: int, epoch: int) -> Key:
        return (index, epoch if self.crop == "random_resized" else 0)

    def _to_decode(self, slots: Slots) -> list[Key]:
        """The images of a batch that are neither in the cache nor known to be unreadable."""
        pairs = zip(slots.indices.tolist(), slots.epochs.tolist(), strict=True)
        keys = dict.fromkeys(self._key(index, epoch) for index, epoch in pairs if index not in self._faults)
        return [key for key in keys if self._images is None or key[0] not in self._images]

    @annotated("data.assemble")
    def _assemble(self, slots: Slots, decoded: Decoded, start: Start, image_size: int, collate: Collate) -> Any:
        """Put a batch together from decoded images, with stand-ins for the samples that cannot be read."""
        self._keep(decoded)
        bad = [slot for slot, index in enumerate(slots.indices.tolist()) if not self.is_readable(index)]
        for slot in bad:
            self._replace(slots, slot, decoded, start)
        self._judge(len(slots.indices), len(bad))
        if self._images is not None:
            images = self._images.take(slots.indices, image_size)
        else:
            keys = map(self._key, slots.indices.tolist(), slots.epochs.tolist())
            images = shrink(torch.from_numpy(np.stack([decoded[key] for key in keys])), image_size)
        notes = [self._notes[index] for index in slots.indices.tolist()]
        shared = {"images": images, "indices": torch.from_numpy(slots.indices), "skipped": len(bad)}
        return collate(slots, notes, {**shared, "source": self.source})

    def _keep(self, decoded: Decoded) -> None:
        """Take note of what was decoded: images into the cache, reasons among the faults."""
        for (index, _), image in decoded.items():
            if isinstance(image, str):
                self._fault(index, image)
            elif self._images is not None:
                self._images.put(index, image)

    def is_readable(self, index: int) -> bool:
        """Say whether a sample has no fault so far and what belongs to its image can be read, and is kept then."""
        if index not in self._notes and index not in self._faults:
            try:
                self._notes[index] = self.read(index)
            except (OSError, ValueError) as error:
                self._fault(index, str(error))
        return index not in self._faults

    def _fault(self, index: int, reason: str) -> None:
        """Remember an unreadable sample and name it in the log, once."""
        if index not in self._faults:
            self._faults[index] = reason = printable(reason)
            name = self.kind.split()[-1]
            logger.warning("skipping %s %d, %s: %s", name, index, printable(self.source.describe(index)), reason)

    def _replace(self, slots: Slots, slot: int, decoded: Decoded, start: Start) -> None:
        """Let the next readable sample of the sequence stand in for an unreadable one."""
        position = int(slots.positions[slot])
        for other in range(position + 1, position + 1 + len(self.source)):
            found = self._slots(np.array([other]))
            index, epoch = int(found.indices[0]), int(found.epochs[0])
            key = self._key(index, epoch)
            if index not in self._faults and key not in decoded and key in self._to_decode(found):
                found_now = start([key])()
                decoded |= found_now
                self._keep(found_now)
            if self.is_readable(index):
                slots.indices[slot], slots.epochs[slot] = index, epoch
                return
            self._judge_in_a_row(other - position)
        raise BadDataError(f"none of the {len(self.source)} {self.kind}s can be read: {self._first_faults()}")

    def _judge(self, seen: int, bad: int) -> None:
        """Count a batch, and stop when too many samples were unreadable."""
        self.samples_seen += seen
        self.samples_bad += bad
        if self.samples_seen >= JUDGED_AFTER and self.samples_bad > self.max_bad_share * self.samples_seen:
            raise BadDataError(
                f"{self.samples_bad} of {self.samples_seen} samples were unreadable, more than "
                f"max_bad_share={self.max_bad_share}: {self._first_faults()}"
            )

    def _judge_in_a_row(self, bad: int) -> None:
        """Stop after so many unreadable samples in a row that no more need be tried: a wrong folder, mostly."""
        if bad >= JUDGED_AFTER and self.samples_bad + bad > self.max_bad_share * (self.samples_seen + bad):
            name = self.kind.split()[-1]
            raise BadDataError(
                f"{bad} {name}s in a row could not be read, more than max_bad_share={self.max_bad_share} lets pass; "
                f"are the images where the data says? {self._first_faults(1)}"
            )

    def _first_faults(self, most: int = NAMED_IN_ERROR) -> str:
        named = [
            f"{printable(self.source.describe(index))}: {reason}" for index, reason in list(self._faults.items())[:most]
        ]
        more = len(self._faults) - len(named)
        return "; ".join(named) + (f"; and {more} more" if more else "")

    def _set_decode_size(self, size: int) -> None:
        """Decode at ``size`` from now on."""
        self._decode_size = size
        fits = self.cache and fits_in_memory(len(self.source), size, self.world_size)
        self._images = PictureCache(len(self.source), size) if fits else None


def require_positive(**counts: int | None) -> None:
    """Refuse counts below 1; None is no count."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def require_share(**shares: float) -> None:
    """Refuse shares outside [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
