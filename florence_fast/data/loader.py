"""Batches of pictures and texts for training, in an order that depends on seed, epoch and position alone.

The samples of a run form one endless sequence: epoch after epoch, each a permutation drawn from (seed, epoch). A
position counts the samples that all ranks have consumed; the batches from a position on are the same for every
number of workers, and the ranks' parts join to the same global batch, so a run resumes by skipping to its position.

Letters: B pairs of a batch · S side of the pictures.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from florence_fast.data.decoding import CROPS, Decoded, Decoder, Here, Key
from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.picture_cache import PictureCache, fits_in_memory, shrink
from florence_fast.data.prompts import draw_text
from florence_fast.data.resizing import INTERPOLATIONS
from florence_fast.data.sampling import TEXT, epoch_order, uniform
from florence_fast.data.workers import Workers
from florence_fast.errors import unknown
from florence_fast.printable import printable
from florence_fast.ranges import annotated

logger = logging.getLogger(__name__)

# The share of unreadable pairs is judged from this many samples on.
JUDGED_AFTER = 200
NAMED_IN_ERROR = 5
NAMED_IN_BATCH = 4
WORKER_TIMEOUT = 300.0  # seconds; longer than a network drive needs to come back


# Begins to decode some images, and returns the call that waits for them.
Start = Callable[[Sequence[Key]], Callable[[], Decoded]]


class BadDataError(RuntimeError):
    """More pairs are unreadable than a run may skip."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one step and rank.

    Args:
        images: uint8 (B, 3, S, S).
        texts: B captions, prompt template included.
        labels: int64 (B,), equal for equal drawn texts (before the template); see `text_label`.
        indices: int64 (B,), the pairs' numbers in the source.
        skipped: how many of the B stand in for an unreadable pair.
        source: where the indices belong to, which names them in messages.
    """

    images: Tensor
    texts: list[str]
    labels: Tensor
    indices: Tensor
    skipped: int
    source: PairSource | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """Name the first pairs, for messages: their numbers, and where each lies."""
        first = self.indices[:NAMED_IN_BATCH].tolist()
        if self.source is None:
            return str(first)
        return ", ".join(f"{index} ({printable(self.source.describe(index))})" for index in first)


class Slots(NamedTuple):
    """Where the pairs of a batch come from: places in the sequence of samples, their epochs and indices, (B,) each."""

    positions: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray


class PairLoader:
    """Batches of a source from any position on.

    Args:
        source: the pairs.
        batch_size: pairs a batch and rank, B.
        image_size: side S of the pictures. They are decoded at the largest size asked for so far and averaged down.
        seed: of the order and of all draws.
        augment_text: draw keywords, short names and templates in place of the plain text; see `draw_text`.
        keyword_prob, template_prob: how often.
        pictures_per_text: pictures of one text that come one after another; see `epoch_order`.
        cache: decode each picture once and keep it as uint8, where half of the memory holds them all. A random crop
            differs from epoch to epoch and is always decoded anew.
        num_workers: processes that decode ahead, each on one thread; 0 decodes in this one.
        worker_timeout: seconds without any finished sample after which a `WorkerError` names those that the workers
            are on.
        rank, world_size: which part of each global batch of ``batch_size * world_size`` samples is ours.
        max_bad_share: largest share of unreadable pairs that is skipped, judged after 200 samples.
        crop: "shortest" (the middle of the image), "longest" (all of it, on a canvas), "squash" (all of it, stretched
            to a square) or "random_resized" (a part of it, drawn from (seed, epoch, index)).
        interpolation: "bicubic" or "bilinear".

    Raises:
        ValueError: the source is empty, or an argument is out of its range.

    >>> batch = next(PairLoader(open_pairs("pairs.csv"), batch_size=8, image_size=64).batches(position=0))
    >>> batch.images.shape
    torch.Size([8, 3, 64, 64])
    """

    def __init__(
        self,
        source: PairSource,
        *,
        batch_size: int,
        image_size: int,
        seed: int = 0,
        augment_text: bool = True,
        keyword_prob: float = 0.3,
        template_prob: float = 0.5,
        pictures_per_text: int = 1,
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
            raise ValueError("source must hold at least one image-text pair, got none")
        if crop not in CROPS:
            raise unknown("crop", crop, CROPS)
        if interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", interpolation, INTERPOLATIONS)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
        _require_positive(batch_size=batch_size, image_size=image_size, pictures_per_text=pictures_per_text)
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if not 0 < worker_timeout < math.inf:
            raise ValueError(f"worker_timeout must be a positive number of seconds, got {worker_timeout}")
        for name, share in (
            ("keyword_prob", keyword_prob),
            ("template_prob", template_prob),
            ("max_bad_share", max_bad_share),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        self.source, self.seed, self.crop, self.interpolation = source, seed, crop, interpolation
        self.batch_size, self.image_size, self.augment_text = batch_size, image_size, augment_text
        self.keyword_prob, self.template_prob = keyword_prob, template_prob
        self.pictures_per_text = pictures_per_text
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.rank, self.world_size = rank, world_size
        self.max_bad_share, self.cache = max_bad_share, cache and crop != "random_resized"
        self.samples_seen = self.samples_bad = 0
        self._faults: dict[int, str] = {}
        self._texts: dict[int, PairText] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._text_ids = self._number_texts() if pictures_per_text > 1 else None
        self._set_decode_size(image_size)

    def configure(
        self, *, batch_size: int | None = None, image_size: int | None = None, augment_text: bool | None = None
    ) -> None:
        """Change what a new stage of training changes; it holds from the next call of `batches` on."""
        _require_positive(batch_size=batch_size, image_size=image_size)
        self.batch_size = batch_size or self.batch_size
        self.image_size = image_size or self.image_size
        self.augment_text = self.augment_text if augment_text is None else augment_text
        if self.image_size > self._decode_size:
            self._set_decode_size(self.image_size)

    def batches(self, position: int, stopping: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Yield this rank's batches without end, from ``position`` on.

        Args:
            position: samples that all ranks together have consumed before.
            stopping: whether the run has been asked to stop. While it is true, workers that make no progress are
                waited for 10 seconds only, so that a run with a stuck worker can still save and end.

        Raises:
            ValueError: ``position`` is negative.
            BadDataError: too many pairs are unreadable; the message counts them and names the first.
            WorkerError: a worker process died, or none of them makes progress; the message names their samples.
        """
        if position < 0:
            raise ValueError(f"position must not be negative, got {position}")
        return self._batches(position, stopping)

    def _batches(self, position: int, stopping: Callable[[], bool]) -> Iterator[Batch]:
        decoder = Decoder(self.source, self._decode_size, self.crop, self.seed, self.interpolation)
        workers = self.num_workers
        decoding = Workers(decoder, workers, self.worker_timeout, stopping) if workers else Here(decoder)
        batch_size, image_size, augment_text = self.batch_size, self.image_size, self.augment_text
        ahead = deque()
        try:
            while True:
                while len(ahead) <= decoding.batches_ahead:
                    start = position + self.rank * batch_size
                    slots = self._slots(np.arange(start, start + batch_size))
                    ahead.append((slots, annotated("data.decode")(decoding.start(self._to_decode(slots)))))
                    position += batch_size * self.world_size
                slots, finish = ahead.popleft()
                yield self._assemble(slots, finish(), decoding.start, image_size, augment_text)
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
            self._orders[epoch] = epoch_order(
                self.seed, epoch, len(self.source), self._text_ids, self.pictures_per_text
            )
        return self._orders[epoch]

    def _key(self, index: int, epoch: int) -> Key:
        return (index, epoch if self.crop == "random_resized" else 0)

    def _to_decode(self, slots: Slots) -> list[Key]:
        """The pictures of a batch that are neither in the cache nor known to be unreadable."""
        pairs = zip(slots.indices.tolist(), slots.epochs.tolist(), strict=True)
        keys = dict.fromkeys(self._key(index, epoch) for index, epoch in pairs if index not in self._faults)
        return [key for key in keys if self._pictures is None or key[0] not in self._pictures]

    @annotated("data.assemble")
    def _assemble(self, slots: Slots, decoded: Decoded, start: Start, image_size: int, augment_text: bool) -> Batch:
        """Put a batch together from decoded pictures, with stand-ins for the pairs that cannot be read."""
        self._keep(decoded)
        bad = [slot for slot, index in enumerate(slots.indices.tolist()) if not self._has_text(index)]
        for slot in bad:
            self._replace(slots, slot, decoded, start)
        self._judge(len(slots.indices), len(bad))
        if self._pictures is not None:
            images = self._pictures.take(slots.indices, image_size)
        else:
            keys = map(self._key, slots.indices.tolist(), slots.epochs.tolist())
            images = shrink(torch.from_numpy(np.stack([decoded[key] for key in keys])), image_size)
        texts, labels = self._draw_texts(slots, augment_text)
        indices = torch.from_numpy(slots.indices)
        return Batch(images, texts, torch.tensor(labels, device="cpu"), indices, len(bad), self.source)

    def _keep(self, decoded: Decoded) -> None:
        """Take note of what was decoded: pictures into the cache, reasons among the faults."""
        for (index, _), picture in decoded.items():
            if isinstance(picture, str):
                self._fault(index, picture)
            elif self._pictures is not None:
                self._pictures.put(index, picture)

    def _has_text(self, index: int) -> bool:
        """Whether a pair has no fault so far and its texts can be read; they are then in ``_texts``."""
        if index not in self._texts and index not in self._faults:
            try:
                self._texts[index] = self.source.texts(index)
            except (OSError, ValueError) as error:
                self._fault(index, str(error))
        return index not in self._faults

    def _fault(self, index: int, reason: str) -> None:
        """Remember an unreadable pair and name it in the log, once."""
        if index not in self._faults:
            self._faults[index] = reason = printable(reason)
            logger.warning("skipping pair %d, %s: %s", index, printable(self.source.describe(index)), reason)

    def _replace(self, slots: Slots, slot: int, decoded: Decoded, start: Start) -> None:
        """Let the next readable pair of the sequence stand in for an unreadable one."""
        position = int(slots.positions[slot])
        for other in range(position + 1, position + 1 + len(self.source)):
            found = self._slots(np.array([other]))
            index, epoch = int(found.indices[0]), int(found.epochs[0])
            key = self._key(index, epoch)
            if index not in self._faults and key not in decoded and key in self._to_decode(found):
                found_now = start([key])()
                decoded |= found_now
                self._keep(found_now)
            if self._has_text(index):
                slots.indices[slot], slots.epochs[slot] = index, epoch
                return
            self._judge_in_a_row(other - position)
        raise BadDataError(f"none of the {len(self.source)} image-text pairs can be read: {self._first_faults()}")

    def _judge(self, seen: int, bad: int) -> None:
        """Count a batch, and stop when too many pairs were unreadable."""
        self.samples_seen += seen
        self.samples_bad += bad
        if self.samples_seen >= JUDGED_AFTER and self.samples_bad > self.max_bad_share * self.samples_seen:
            raise BadDataError(
                f"{self.samples_bad} of {self.samples_seen} samples were unreadable, more than "
                f"max_bad_share={self.max_bad_share}: {self._first_faults()}"
            )

    def _judge_in_a_row(self, bad: int) -> None:
        """Stop after so many unreadable pairs in a row that a whole table need not be tried: a wrong folder, mostly."""
        if bad >= JUDGED_AFTER and self.samples_bad + bad > self.max_bad_share * (self.samples_seen + bad):
            raise BadDataError(
                f"{bad} pairs in a row could not be read, more than max_bad_share={self.max_bad_share} lets pass; "
                f"are the pictures where the data says? {self._first_faults(1)}"
            )

    def _first_faults(self, most: int = NAMED_IN_ERROR) -> str:
        named = [
            f"{printable(self.source.describe(index))}: {reason}" for index, reason in list(self._faults.items())[:most]
        ]
        more = len(self._faults) - len(named)
        return "; ".join(named) + (f"; and {more} more" if more else "")

    @annotated("data.texts")
    def _draw_texts(self, slots: Slots, augment_text: bool) -> tuple[list[str], list[int]]:
        """Captions and labels of a batch."""
        pairs = [self._texts[index] for index in slots.indices.tolist()]
        if not augment_text:
            return [pair.text for pair in pairs], [text_label(pair.text) for pair in pairs]
        draws = uniform(self.seed, TEXT, slots.epochs, slots.indices, 4).tolist()
        drawn = [
            draw_text(pair, row, self.keyword_prob, self.template_prob) for pair, row in zip(pairs, draws, strict=True)
        ]
        return [caption for _, caption in drawn], [text_label(words) for words, _ in drawn]

    def _number_texts(self) -> np.ndarray:
        """An id for each pair, equal for equal texts; a pair without text has one of its own."""
        readable = map(self._has_text, range(len(self.source)))
        names = [text_label(self._texts[index].text) if ok else index for index, ok in enumerate(readable)]
        return np.unique(np.array(names), return_inverse=True)[1]

    def _set_decode_size(self, size: int) -> None:
        """Decode at ``size`` from now on."""
        self._decode_size = size
        fits = self.cache and fits_in_memory(len(self.source), size, self.world_size)
        self._pictures = PictureCache(len(self.source), size) if fits else None


def _require_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
