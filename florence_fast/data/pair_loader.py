"""Batches of image-text pairs, with texts drawn anew in every epoch.

Letters: B pairs of a batch · S side of the images.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from florence_fast.data.labels import text_label
from florence_fast.data.loader import Collate, ImageBatch, Loader, Slots, require_positive, require_share
from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.prompts import draw_text
from florence_fast.data.sampling import TEXT, epoch_order, uniform
from florence_fast.ranges import annotated


@dataclass(frozen=True, kw_only=True)
class PairBatch(ImageBatch):
    """Pairs of one step and rank.

    Args:
        texts: B captions, prompt template included.
        labels: int64 (B,), equal for equal drawn texts (before the template); see `text_label`.
    """

    texts: list[str]
    labels: Tensor


class PairLoader(Loader):
    """Batches of pairs from any position on.

    Args:
        source: the pairs.
        augment_text: draw keywords, short names and templates in place of the plain text; see `draw_text`.
        keyword_prob, template_prob: how often.
        images_per_text: images of one text that come one after another; see `epoch_order`.
        options: those of `Loader`.

    Raises:
        ValueError: the source is empty, or an argument is out of its range.

    >>> batch = next(PairLoader(open_pairs("pairs.csv"), batch_size=8, image_size=64).batches(position=0))
    >>> batch.images.shape
    torch.Size([8, 3, 64, 64])
    """

    kind = "image-text pair"
    source: PairSource

    def __init__(
        self,
        source: PairSource,
        *,
        augment_text: bool = True,
        keyword_prob: float = 0.3,
        template_prob: float = 0.5,
        images_per_text: int = 1,
        **options: Any,
    ) -> None:
        require_positive(images_per_text=images_per_text)
        require_share(keyword_prob=keyword_prob, template_prob=template_prob)
        super().__init__(source, **options)
        self.augment_text = augment_text
        self.keyword_prob, self.template_prob = keyword_prob, template_prob
        self.images_per_text = images_per_text
        self._text_ids = self._number_texts() if images_per_text > 1 else None

    def configure(self, *, augment_text: bool | None = None, **options: Any) -> None:
        """Change what a new stage of training changes; it holds from the next call of `batches` on."""
        super().configure(**options)
        self.augment_text = self.augment_text if augment_text is None else augment_text

    def read(self, index: int) -> PairText:
        """Return the texts of a pair."""
        return self.source.texts(index)

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of one epoch, with images of one text in groups."""
        return epoch_order(self.seed, epoch, len(self.source), self._text_ids, self.images_per_text)

    def collator(self) -> Collate:
        """Return what adds captions and labels to the images of a batch."""
        return partial(self._collate, self.augment_text)

    def _collate(self, augment_text: bool, slots: Slots, pairs: list[PairText], of_images: dict[str, Any]) -> PairBatch:
        texts, labels = self._draw_texts(slots, pairs, augment_text)
        return PairBatch(texts=texts, labels=torch.tensor(labels, device="cpu"), **of_images)

    @annotated("data.texts")
    def _draw_texts(self, slots: Slots, pairs: list[PairText], augment_text: bool) -> tuple[list[str], list[int]]:
        """Captions and labels of a batch."""
        if not augment_text:
            return [pair.text for pair in pairs], [text_label(pair.text) for pair in pairs]
        draws = uniform(self.seed, TEXT, slots.epochs, slots.indices, 4).tolist()
        drawn = [
            draw_text(pair, row, self.keyword_prob, self.template_prob) for pair, row in zip(pairs, draws, strict=True)
        ]
        return [caption for _, caption in drawn], [text_label(words) for words, _ in drawn]

    def _number_texts(self) -> np.ndarray:
        """An id for each pair, equal for equal texts; a pair without text has one of its own."""
        readable = map(self.is_readable, range(len(self.source)))
        names = [text_label(self._notes[index].text) if ok else index for index, ok in enumerate(readable)]
        return np.unique(np.array(names), return_inverse=True)[1]
