"""Features of many pictures or texts: batches, the right device and precision, broken pictures named and left out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from florence_fast.data.loader import BadDataError
from florence_fast.data.pairs import PairSource, Subset
from florence_fast.data.transforms import image_transform
from florence_fast.errors import unknown

log = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "amp_bf16": torch.bfloat16, "amp": torch.float16}
UNREADABLE = (OSError, ValueError)  # what a source raises for a pair that cannot be read
Item = TypeVar("Item")
ImageTransform = Callable[[Image.Image], Tensor]


class Pictures(Protocol):
    """Whatever holds pictures by number: a ``PairSource``, or a plain folder."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str: ...


class EncodedImages(NamedTuple):
    """Features of the pictures that could be read, and which those are."""

    features: Tensor
    """(N, D) fp32 on the CPU, each of length 1."""
    indices: list[int]
    """The number of each row's picture in its source; a broken picture is missing here."""


def encode_images(
    model: nn.Module,
    pictures: Pictures,
    transform: ImageTransform | None = None,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    max_bad_share: float = 0.01,
    progress: bool = False,
) -> EncodedImages:
    """Encode every picture of a source with the image tower.

    A picture that cannot be read is named in the log and left out.

    Args:
        model: A dual encoder with ``encode_image``; its first parameter says device and dtype.
        pictures: The source.
        transform: From a PIL picture to a (3, H, W) tensor; by default the model's own evaluation transform.
        batch_size: Pictures in one forward pass.
        precision: "fp32", "amp_bf16" or "amp" (float16 autocast).
        max_bad_share: Share of unreadable pictures, 0 to 1, above which the call fails.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no picture.
        BadDataError: More than ``max_bad_share`` of the pictures cannot be read, or none can.
    """
    if len(pictures) == 0:
        raise ValueError("there must be at least one picture to encode, got an empty source")
    transform = transform or evaluation_transform(model)
    images = _readable(pictures, lambda index: transform(pictures.image(index)), max_bad_share)
    bar = tqdm(images, desc="pictures", unit="img", total=len(pictures), disable=not progress)
    indices, features = [], []
    with evaluating(model, precision):
        for batch in _batches(bar, batch_size):
            indices += [index for index, _ in batch]
            images_BCHW = torch.stack([image for _, image in batch]).to(_first_parameter(model))
            features.append(_normalized(model.encode_image(images_BCHW)))
    if not features:
        raise BadDataError(f"none of {len(pictures)} pictures can be read; first: {pictures.describe(0)}")
    return EncodedImages(torch.cat(features), indices)


def encode_texts(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    precision: str = "fp32",
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
        for batch in _batches(tqdm(texts, desc="texts", unit="text", disable=not progress), batch_size):
            tokens_BL = tokenizer(batch).to(_first_parameter(model).device)
            features.append(_normalized(model.encode_text(tokens_BL)))
    return torch.cat(features)


def with_texts(source: PairSource, max_bad_share: float = 0.01) -> tuple[PairSource, list[str]]:
    """Return the pairs of ``source`` whose text can be read, and these texts; the others are named in the log.

    Raises:
        BadDataError: More than ``max_bad_share`` of the texts cannot be read.
    """
    kept = list(_readable(source, lambda index: source.texts(index).text, max_bad_share))
    return Subset(source, [index for index, _ in kept]), [text for _, text in kept]


def evaluation_transform(model: nn.Module, size: int | None = None) -> ImageTransform:
    """Return the transform that the model's configuration asks for, with its size unless another is given."""
    config = model.config
    size = size or config.image.img_size
    return image_transform(size, is_train=False, mean=config.image_mean, std=config.image_std)


@contextmanager
def evaluating(model: nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Run ``model`` in evaluation mode, without gradients, at ``precision``; its mode is restored afterwards.

    Raises:
        ValueError: ``precision`` is none of "fp32", "amp_bf16" and "amp".
    """
    if precision not in AUTOCAST:
        raise unknown("precision", precision, AUTOCAST)
    dtype, was_training = AUTOCAST[precision], model.training
    device_type = _first_parameter(model).device.type
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if dtype is None else torch.autocast(device_type, dtype):
            yield
    finally:
        model.train(was_training)


def _readable(source: Pictures, read: Callable[[int], Item], max_bad_share: float) -> Iterator[tuple[int, Item]]:
    """Yield (number, what was read) of each pair that can be read; name the others and stop when they are too many."""
    broken = []
    for index in range(len(source)):
        try:
            item = read(index)
        except UNREADABLE as error:
            broken.append(source.describe(index))
            log.warning("skipped %s: %s", broken[-1], error)
            if len(broken) > max_bad_share * len(source):
                raise BadDataError(
                    f"{len(broken)} of {len(source)} pairs cannot be read, more than the allowed share "
                    f"{max_bad_share:g}; first: {', '.join(broken[:3])}"
                ) from error
        else:
            yield index, item


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut ``items`` into lists of ``size``; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _first_parameter(model: nn.Module) -> Tensor:
    """The parameter whose device and dtype the inputs follow."""
    return next(model.parameters())


def _normalized(features_BD: Tensor) -> Tensor:
    """Scale to length 1 in fp32, whatever the precision of the towers, and move to the CPU."""
    return F.normalize(features_BD.float(), dim=-1).cpu()
