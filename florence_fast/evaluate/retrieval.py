"""Image-text retrieval in both directions, where an image may have several right texts and a text several images."""

import hashlib
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairSource
from florence_fast.data.prompts import fill
from florence_fast.evaluate.features import (
    ImageTransform,
    encode_images,
    encode_texts,
    evaluation_transform,
    with_texts,
)
from florence_fast.evaluate.ranking import ranks, recalls
from florence_fast.models.florence import Florence


def retrieval(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    source: PairSource,
    *,
    template: str = "{}",
    merge_equal_images: bool = True,
    transform: ImageTransform | None = None,
    batch_size: int = 256,
    precision: str = "auto",
    max_bad_share: float = 0.01,
    progress: bool = False,
) -> dict[str, dict[str, float] | int]:
    """Measure recall at 1, 5 and 10 from images to texts and from texts to images.

    The pool is every image and every distinct text of ``source``. Equal texts (as training labels compare
    them) are one text with several right images; equal pixels are one image with several right texts, as
    in COCO's five captions an image. A query is answered at k when any right answer is among the first k.

    Args:
        model: A dual encoder.
        tokenizer: From texts to tokens.
        source: Images with their texts.
        template: What is asked for a text; ``{}`` stands for it.
        merge_equal_images: Whether rows with the same pixels are one image, or each row is its own.
        transform: From a PIL image to a tensor; by default the model's own evaluation transform.
        batch_size: Images or texts in one forward pass.
        precision: A word of ``florence_fast.precision``.
        max_bad_share: Share of unreadable images or texts, 0 to 1, above which the call fails.
        progress: Show progress bars.

    Returns:
        ``{"image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}, "images": n, "texts": m}``.

    Raises:
        ValueError: The source is empty.
        BadDataError: More than ``max_bad_share`` of the images or texts cannot be read.
    """
    source, texts = with_texts(source, max_bad_share)
    same_pixels = _PixelIdentity(transform or evaluation_transform(model))
    encoded = encode_images(
        model,
        source,
        same_pixels,
        batch_size=batch_size,
        precision=precision,
        max_bad_share=max_bad_share,
        progress=progress,
    )
    texts = [texts[index] for index in encoded.indices]
    image_of_row, first_rows = _number_distinct(same_pixels.digests if merge_equal_images else encoded.indices)
    text_of_row, first_texts = _number_distinct([text_label(text) for text in texts])

    images_ND = encoded.features[first_rows]
    asked = [fill(template, texts[row]) for row in first_texts]
    texts_MD = encode_texts(model, tokenizer, asked, batch_size=batch_size, precision=precision, progress=progress)
    right = torch.tensor(sorted(set(zip(image_of_row, text_of_row, strict=True))), device="cpu")
    return {
        "image_to_text": recalls(ranks(images_ND, texts_MD, right)),
        "text_to_image": recalls(ranks(texts_MD, images_ND, right.flip(1))),
        "images": len(images_ND),
        "texts": len(texts_MD),
    }


class _PixelIdentity:
    """A transform that remembers a digest of every image that it let through, to tell equal ones."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self.digests: list[bytes] = []

    def __call__(self, image: Image.Image) -> Tensor:
        tensor = self.transform(image)
        self.digests.append(hashlib.blake2b(image.tobytes(), digest_size=16).digest())
        return tensor


def _number_distinct(keys: list) -> tuple[list[int], list[int]]:
    """Number equal keys equally, by first appearance: (the number of each key, where each number first stood)."""
    numbers: dict = {}
    first = []
    for row, key in enumerate(keys):
        if key not in numbers:
            numbers[key] = len(numbers)
            first.append(row)
    return [numbers[key] for key in keys], first
