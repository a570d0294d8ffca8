"""Features of many images or texts: batches, the right device and precision, broken images named and left out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from florence_fast.data.loader import JUDGED_AFTER, BadDataError
from florence_fast.data.pairs import PairSource, Subset
from florence_fast.data.transforms import image_transform
from florence_fast.models.florence import Florence
from florence_fast.precision import autocast, check_precision, input_dtype, resolve_precision, weights_dtype
from florence_fast.printable import printable

log = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError)  # what a source raises for a pair that cannot be read
Item = TypeVar("Item")
ImageTransform = Callable[[Image.Image], Tensor]


class Images(Protocol):
    """Whatever holds images by number: a ``PairSource``, or a plain folder."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str: ...


class EncodedImages(NamedTuple):
    """Features of the images that could be read, and which those are."""

    features: Tensor
    """(N, D) fp32 on the CPU, each of length 1."""
    indices: list[int]
    """The number of each row's image in its source; a broken image is missing here."""


def encode_images(
    model: Florence,
    images: Images,
    transform: ImageTransform | None = None,
    *,
    batch_size: int = 256,
    precision: str = "auto",
    max_bad_share: float = 0.01,
    progress: bool = False,
) -> EncodedImages:
    """Encode every image of a source with the image tower.

    An image that cannot be read is named in the log and left out.

    Args:
        model: A dual encoder with ``encode_image``; its parameters say device and dtype.
        images: The source.
        transform: From a PIL image to a (3, H, W) tensor; by default the model's own evaluation transform.
        batch_size: Images in one forward pass.
        precision: A word of ``florence_fast.precision``; "auto" is bf16 autocast where the device is fast at it.
        max_bad_share: Share of unreadable images, 0 to 1, above which the call fails.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no image.
        BadDataError: More than ``max_bad_share`` of the images cannot be read, or none can.
    """
    if len(images) == 0:
        raise ValueError("there must be at least one image to encode, got an empty source")
    transform = transform or evaluation_transform(model)
    tensors = readable(images, lambda index: transform(images.image(index)), max_bad_share)
    bar = tqdm(tensors, desc="images", unit="img", total=len(images), disable=not progress)
    indices, features = [], []
    with evaluating(model, precision):
        for batch in in_batches(bar, batch_size):
            indices += [index for index, _ in batch]
            images_BCHW = torch.stack([image for _, image in batch]).to(device_of(model), input_dtype(model))
            features.append(_normalized(model.encode_image(images_BCHW)))
    if not features:
        raise BadDataError(f"none of {len(images)} images can be read; first: {images.describe(0)}")
    return EncodedImages(torch.cat(features), indices)


def encode_texts(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    precision: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Encode texts with the text tower, as they are and in their order.

    Returns:
        (len(texts), D) fp32 on the CPU, each row of length 1.

    Raises:
        ValueError: There is no text.
    """
    if len(texts) == 0:
        raise ValueError("there must be at least one text to encode, got an empty list")
    features = []
    with evaluating(model, precision):
        for batch in in_batches(tqdm(texts, desc="texts", unit="text", disable=not progress), batch_size):
            tokens_BL = tokenizer(batch).to(device_of(model))
            features.append(_normalized(model.encode_text(tokens_BL)))
    return torch.cat(features)


def with_texts(source: PairSource, max_bad_share: float = 0.01) -> tuple[PairSource, list[str]]:
    """Return the pairs of ``source`` whose text can be read, and these texts; the others are named in the log.

    Raises:
        BadDataError: More than ``max_bad_share`` of the texts cannot be read.
    """
    kept = list(readable(source, lambda index: source.texts(index).text, max_bad_share))
    return Subset(source, [index for index, _ in kept]), [text for _, text in kept]


def evaluation_transform(model: Florence, size: int | None = None) -> ImageTransform:
    """Return the transform that the model's configuration asks for, with its size unless another is given."""
    config = model.config
    mean, std = config.image_mean, config.image_std
    return image_transform(size or config.image.img_size, False, mean, std, config.resize_mode, config.interpolation)


@contextmanager
def evaluating(model: nn.Module, precision: str = "auto") -> Iterator[None]:
    """Run ``model`` in evaluation mode, without gradients, at ``precision``; its mode is restored afterwards.

    Raises:
        ValueError: ``precision`` is unknown, or one of weights, "bf16" for example, that the model's weights have not.
    """
    device, was_training = device_of(model), model.training
    region = autocast(_in_force(model, precision, device), device)
    model.eval()
    try:
        with torch.no_grad(), region:
            yield
    finally:
        model.train(was_training)


def readable(source: Images, read: Callable[[int], Item], max_bad_share: float) -> Iterator[tuple[int, Item]]:
    """Yield (number, what was read) of each pair that can be read; name the others and stop when they are too many."""
    broken = []
    for index in range(len(source)):
        try:
            item = read(index)
        except UNREADABLE as error:
            broken.append(printable(source.describe(index)))
            log.warning("skipped %s: %s", broken[-1], printable(error))
            if len(broken) == index + 1 == JUDGED_AFTER and max_bad_share < 1:
                raise BadDataError(
                    f"none of the first {len(broken)} of {len(source)} pairs can be read; are the images where the "
                    f"data says? {broken[-1]}: {printable(error)}"
                ) from error
            if len(broken) > max_bad_share * len(source):
                raise BadDataError(
                    f"{len(broken)} of {len(source)} pairs cannot be read, more than --max-bad-share allows, "
                    f"max_bad_share={max_bad_share:g}; first: {', '.join(broken[:3])}"
                ) from error
        else:
            yield index, item


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut ``items`` into lists of ``size``; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters, to which its inputs go."""
    return next(model.parameters()).device


def _in_force(model: nn.Module, precision: str, device: torch.device) -> str:
    """Resolve a word; "auto" leaves products of 16-bit weights as they are."""
    wanted, present = weights_dtype(precision), input_dtype(model)
    if wanted not in (None, present):
        raise ValueError(
            f"precision {precision!r} is one of weights, and those of this model are {present}: "
            f"create_model(..., precision={precision!r}) casts them"
        )
    if check_precision(precision) == "auto" and present in (torch.bfloat16, torch.float16):
        return "bf16" if present == torch.bfloat16 else "fp16"
    return resolve_precision(precision, device)


def _normalized(features_BD: Tensor) -> Tensor:
    """Scale to length 1 in fp32, whatever the precision of the towers, and move to the CPU."""
    return F.normalize(features_BD.float(), dim=-1).cpu()
