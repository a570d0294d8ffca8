"""``AutoImageProcessor`` of ``model_type: florence_fast``; see transformers_registry.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from florence_fast.data.transforms import image_transform


class FlorenceFastImageProcessor(BaseImageProcessor):
    """The evaluation transform of a model, on Pillow and torch alone.

    Args:
        size: height and width of what the model reads.
        image_mean: subtracted from each channel.
        image_std: by which it is then divided.
        resize_mode: "shortest", "longest" or "squash"; see `florence_fast.image_transform`.
        interpolation: "bicubic" or "bilinear".
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        size: int = 224,
        image_mean: Iterable[float] = (0.485, 0.456, 0.406),
        image_std: Iterable[float] = (0.229, 0.224, 0.225),
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, list(image_mean), list(image_std)
        self.resize_mode, self.interpolation = resize_mode, interpolation

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Turn one PIL image, or the path of one, or a list of them into ``pixel_values``, (B, 3, size, size)."""
        mean, std = tuple(self.image_mean), tuple(self.image_std)
        transform = image_transform(self.size, False, mean, std, self.resize_mode, self.interpolation)
        listed = list(images) if isinstance(images, list | tuple) else [images]
        pixels = torch.stack([transform(image) for image in listed])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
