"""Accuracy of a classifier: over all images, and as the mean over classes.

Letters: B images of a batch · K classes
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from florence_fast.evaluate.features import (
    ImageTransform,
    device_of,
    evaluating,
    in_batches,
    readable,
)
from florence_fast.precision import input_dtype


class LabelledImages(Protocol):
    """Images by number, each of one class."""

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str: ...


def classification(
    model: nn.Module,
    source: LabelledImages,
    transform: ImageTransform,
    *,
    batch_size: int = 64,
    precision: str = "auto",
    max_bad_share: float = 0.01,
) -> dict[str, float | int]:
    """Measure a classifier on labelled images; one that cannot be read is named in the log and left out.

    Args:
        model: (B, 3, H, W) -> logits (B, K), in the order of ``source.classes``.
        source: the images.
        transform: from an image to a tensor (3, H, W).
        batch_size: images in one forward pass.
        precision: a word of ``florence_fast.precision``.
        max_bad_share: share of unreadable images above which the call fails.

    Returns:
        "top1" and "mean_per_class" (top-1 of each class that has images, averaged) as fractions, "top5" where there
        are more than 5 classes, and "classes" and "images" as counts.

    Raises:
        ValueError: there is no image.
        BadDataError: too many images cannot be read.
    """
    if len(source) == 0:
        raise ValueError("source must hold at least one image, got none")
    images = readable(source, lambda index: transform(source.image(index)), max_bad_share)
    ranked, labels = [], []
    with evaluating(model, precision):
        for batch in in_batches(images, batch_size):
            images_BCHW = torch.stack([image for _, image in batch]).to(device_of(model), input_dtype(model))
            logits_BK = model(images_BCHW).float()
            ranked.append(logits_BK.topk(min(5, logits_BK.shape[1])).indices.cpu())
            labels += [source.labels[index] for index, _ in batch]
    return accuracy(torch.cat(ranked), torch.tensor(labels, device="cpu"), len(source.classes))


def accuracy(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float | int]:
    """Return the figures of `classification` for N images.

    Args:
        ranked: int64 (N, up to 5), the likeliest classes of each image, the first one first.
        labels: int64 (N,), the right classes.
        num_classes: K.
    """
    hits = ranked == labels[:, None]
    first = hits[:, 0].double()
    per_class = torch.zeros(num_classes, dtype=torch.float64, device="cpu").index_add_(0, labels, first)
    counts = torch.bincount(labels, minlength=num_classes)
    present = counts > 0
    figures: dict[str, float | int] = {
        "top1": first.mean().item(),
        "mean_per_class": (per_class[present] / counts[present]).mean().item(),
    }
    if num_classes > 5:
        figures["top5"] = hits.any(1).double().mean().item()
    return {**figures, "classes": num_classes, "images": len(labels)}


def class_probabilities(
    model: nn.Module, image: Image.Image, transform: ImageTransform, *, precision: str = "auto"
) -> list[float]:
    """Return the probability of each of K classes for one image."""
    pixels_1CHW = transform(image).unsqueeze(0).to(device_of(model), input_dtype(model))
    with evaluating(model, precision):
        return model(pixels_1CHW).float().softmax(-1)[0].tolist()
