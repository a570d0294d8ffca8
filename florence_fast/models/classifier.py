"""An image tower with class names, as a file of fine-tuned weights describes it.

Letters: K classes
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from florence_fast.models.config import IMAGENET_MEAN, IMAGENET_STD, FlorenceConfig
from florence_fast.models.factory import build_with, cast_weights
from florence_fast.models.reading import Checkpoint, read_checkpoint
from florence_fast.models.registry import config_from_dict
from florence_fast.models.tower import ImageTower
from florence_fast.strict_json import format_json, parse_json

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

CLASSES_KEY = "florence_fast_classes"
PREPROCESSING_KEY = "florence_fast_preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to a tower, which has no configuration of its own for it.

    Args:
        image_mean, image_std: of the channels, in [0, 1].
        resize_mode: "shortest", "longest" or "squash".
        interpolation: "bicubic" or "bilinear".
    """

    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, values: Any) -> Preprocessing:
        """Return that of a dual encoder's configuration, or of a dict."""
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: values[name] if isinstance(values, dict) else getattr(values, name) for name in names}
        frozen: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in found.items()}
        return cls(**frozen)

    def transform(self, image_size: int) -> Callable[[Image.Image], Tensor]:
        """Return the transform from an image to a tensor (3, S, S) for evaluation."""
        from florence_fast.data.transforms import image_transform

        return image_transform(image_size, False, self.image_mean, self.image_std, self.resize_mode, self.interpolation)


@dataclass(frozen=True)
class Classifier:
    """A tower whose head tells K classes apart, their names, and how it wants its images."""

    tower: ImageTower
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the transform from an image to what the tower takes."""
        return self.preprocessing.transform(self.tower.config.img_size)


def classifier_metadata(classes: Sequence[str], preprocessing: Preprocessing) -> dict[str, str]:
    """Return the entries of a weights file's header from which `load_classifier` reads them."""
    return {
        CLASSES_KEY: format_json(list(classes)),
        PREPROCESSING_KEY: format_json(dataclasses.asdict(preprocessing)),
    }


def load_classifier(
    path: str | os.PathLike[str], precision: str = "fp32", device: str | torch.device = "cpu"
) -> Classifier:
    """Load a classifier from the folder or file of a run of `train classification`; nothing else is needed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file does not hold a classifier.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.config is None or CLASSES_KEY not in checkpoint.metadata:
        raise ValueError(f"{checkpoint.path} holds no classifier: its header names no classes")
    tower = build_with(config_from_dict(checkpoint.config), checkpoint).eval()
    classes, found = classes_of(checkpoint), preprocessing_of(checkpoint)
    if not isinstance(tower, ImageTower) or tower.config.num_classes != len(classes):
        raise ValueError(f"{checkpoint.path} holds no classifier of the {len(classes)} classes that its header names")
    return Classifier(cast_weights(tower, precision).to(device), classes, found or Preprocessing())


def classes_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the class names in a file's header, none where it has none."""
    text = checkpoint.metadata.get(CLASSES_KEY)
    return tuple(parse_json(text, f"{CLASSES_KEY} of {checkpoint.path}")) if text else ()


def preprocessing_of(checkpoint: Checkpoint) -> Preprocessing | None:
    """Return the preprocessing that a file states: in its header, or as the configuration of a dual encoder."""
    if text := checkpoint.metadata.get(PREPROCESSING_KEY):
        return Preprocessing.of(parse_json(text, f"{PREPROCESSING_KEY} of {checkpoint.path}"))
    config = checkpoint.config and config_from_dict(checkpoint.config)
    return Preprocessing.of(config) if isinstance(config, FlorenceConfig) else None


@torch.no_grad()
def reset_head(tower: ImageTower, classes: Sequence[str], earlier: Sequence[str] = ()) -> None:
    """Give ``tower`` a head for ``classes``: rows of the classes that it knew by name are kept, others are drawn.

    Args:
        tower: changed in place.
        classes: K names.
        earlier: names of the rows of the present head, if they are known.
    """
    old = tower.get_classifier()
    tower.reset_classifier(len(classes))
    if not isinstance(old, nn.Linear) or old.out_features != len(earlier):
        return
    row_of = {name: row for row, name in enumerate(earlier)}
    kept = [(row, row_of[name]) for row, name in enumerate(classes) if name in row_of]
    head = cast(nn.Linear, tower.head)
    for row, before in kept:
        head.weight[row] = old.weight[before]
        head.bias[row] = old.bias[before]
    log.info("the head keeps %d of %d classes by name", len(kept), len(classes))
