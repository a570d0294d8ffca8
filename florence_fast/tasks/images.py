"""Turn batches of decoded uint8 images into normalised input tensors.

Letters: B images of a batch · S side of the images
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.data.augment import BatchAugment
from florence_fast.train.distributed import rank

Augment = Callable[[Tensor, int, int, int], Tensor]
"""``augment(images_uint8 (B, 3, H, W), image_size, seed, step) -> (B, 3, S, S)``, normalised."""
_RANK_STRIDE = 1_000_003


def plain_images(config: Any) -> Augment:
    """Return an augmentation that changes nothing: it resizes by area and normalises.

    Args:
        config: has ``image_mean`` and ``image_std``.
    """

    @cache
    def on(device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=device) for values in (config.image_mean, config.image_std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    def resize_and_normalise(images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        mean, std = on(images.device)
        x = images.float().div_(255)
        if x.shape[-2:] != (image_size, image_size):
            x = F.interpolate(x, size=(image_size, image_size), mode="area")
        return (x - mean) / std

    return resize_and_normalise


def augmentation(config: Any, wanted: bool) -> Augment:
    """Return random changes of shape and colour if they are ``wanted``, or `plain_images`."""
    return BatchAugment(config.image_mean, config.image_std) if wanted else plain_images(config)


def seed_of_rank(seed: int) -> int:
    """Return the seed of this rank's augmentation: no two ranks draw the same."""
    return seed + _RANK_STRIDE * rank()
