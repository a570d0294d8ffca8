"""Fine-tuning an image tower, or a linear layer on top of it, to tell classes apart (sections 3.2 and 3.3).

Letters: B images of a batch · K classes
"""

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast.data.class_folders import ClassFolders, LabelBatch, LabelLoader
from florence_fast.data.decoding import CROPS
from florence_fast.evaluate.classification import classification
from florence_fast.models.classifier import (
    Preprocessing,
    classes_of,
    classifier_metadata,
    preprocessing_of,
    reset_head,
)
from florence_fast.models.config import FlorenceConfig
from florence_fast.models.factory import create_model, local_path, model_config
from florence_fast.models.florence import Florence
from florence_fast.models.pretrained import find_pretrained, list_pretrained
from florence_fast.models.reading import read_checkpoint
from florence_fast.models.saving import CONFIG_KEY
from florence_fast.models.tower import ImageTower
from florence_fast.precision import input_dtype
from florence_fast.ranges import annotated
from florence_fast.strict_json import format_json
from florence_fast.tasks.images import Augment, augmentation, seed_of_rank
from florence_fast.train.config import Stage
from florence_fast.train.distributed import rank, world_size
from florence_fast.train.optim import layer_decay, parameter_groups
from florence_fast.train.settings import Settings, number, word
from florence_fast.train.task import Evaluator, Inputs, Task


@dataclass(frozen=True)
class ClassificationConfig(Settings):
    """Settings of fine-tuning with class labels.

    Args:
        freeze_tower: train the head alone, a linear probe; drop path is off then.
        layer_decay: factor of the learning rate from each layer to the one before it; 1 gives all the same.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of the Beta distribution by which pairs of images are mixed; 0 mixes none.
        crop: what a sample shows of its image: shortest (its middle), longest, squash or random_resized. None takes
            that of the weights. Any other than random_resized holds for evaluation too.
        cache: decode each image once and keep it, where half of the memory holds them all.
        augment: turn, shear and recolour the images.
    """

    freeze_tower: bool = False
    layer_decay: float = number(1.0, "lie in (0, 1]", lambda x: 0 < x <= 1)
    label_smoothing: float = number(0.0, "lie in [0, 1)", lambda x: 0 <= x < 1)
    mixup: float = number(0.0, "be a number and not negative", lambda x: x >= 0)
    crop: str | None = word(None, CROPS)
    cache: bool = True
    augment: bool = False


@dataclass(frozen=True)
class ClassificationInputs(Inputs):
    """An image tower, or that of a dual encoder, and folders of classes.

    Args:
        train_data: folder with one folder a class.
        val_data: the same for evaluation; classes are those of the training data.
        pretrained: weights to start from: a tag, a folder (of a run, too), a file, or none. By default the model's
            first tag, if it has one.
    """

    model: str = "florence_nano"
    val_data: str | None = None

    def image_size(self) -> int:
        """Return the image size of the tower."""
        config = model_config(self.model)
        return (config.image if isinstance(config, FlorenceConfig) else config).img_size

    def open(self) -> ClassFolders:
        """Open the images for training."""
        return ClassFolders(self.train_data)

    def create(self, source: ClassFolders, settings: "ClassificationConfig", device: str) -> "ClassificationTask":
        """Build the tower with a head for the classes of ``source``; rows of classes known by name are kept."""
        validation = None if self.val_data is None else ClassFolders(self.val_data, source.classes)
        tags = [tag for name, tag in list_pretrained() if name == self.model]
        pretrained = self.pretrained or (tags[0] if tags else None)
        pretrained = None if pretrained == "none" else pretrained
        model = create_model(self.model, pretrained)
        preprocessing, classes = Preprocessing(), ()
        if (path := find_pretrained(self.model, pretrained) if pretrained else local_path(self.model)) is not None:
            weights = read_checkpoint(path)
            preprocessing, classes = preprocessing_of(weights) or preprocessing, classes_of(weights)
        if isinstance(model, Florence):
            preprocessing, model = Preprocessing.of(model.config), model.visual
        reset_head(model, source.classes, classes)
        model.to(device)
        return ClassificationTask(model, source, settings, preprocessing=preprocessing, validation=validation)

    def next_commands(self, folder: Path) -> Sequence[str]:
        """Return how the weights, which hold their classes, are measured and used."""
        weights = shlex.join(["--model", str(folder)])
        return (
            f"florence-fast evaluate classification {weights} --data FOLDER",
            f"florence-fast predict {weights} --image IMAGE",
        )


class ClassificationTask(Task):
    """Fine-tune an image tower on labelled images.

    Args:
        model: a tower on its device, whose head has a row for every class of ``source``.
        source: the images and their classes.
        config: the task's settings.
        preprocessing: how the tower wants its images.
        validation: what is evaluated on, with the classes of ``source``.
        augment: image augmentation in place of what ``config.augment`` means.
    """

    name = "classification"
    settings = ClassificationConfig
    inputs = ClassificationInputs
    model: ImageTower
    config: ClassificationConfig

    def __init__(
        self,
        model: ImageTower,
        source: ClassFolders,
        config: ClassificationConfig | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        validation: ClassFolders | None = None,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(model, config)
        if model.config.num_classes != len(source.classes):
            raise ValueError(
                f"model must have a head of {len(source.classes)} classes, got {model.config.num_classes}: "
                "reset_head(model, source.classes) gives it one"
            )
        self.source, self.validation = source, validation
        self.epoch_size = len(source)
        self.preprocessing = preprocessing or Preprocessing()
        if self.config.crop not in (None, "random_resized"):
            mode = "shortest" if self.config.crop == "center" else self.config.crop
            self.preprocessing = replace(self.preprocessing, resize_mode=mode)
        self.augment = augment or augmentation(self.preprocessing, self.config.augment)
        if self.config.freeze_tower:
            _freeze_all_but_head(model)

    @cached_property
    def loader(self) -> LabelLoader:
        """Reads and orders the images."""
        run, config = self.run, self.config
        return LabelLoader(
            self.source,
            batch_size=run.batch_size,
            image_size=max(stage.image_size for stage in run.stages),
            seed=run.seed,
            cache=config.cache,
            num_workers=run.num_workers,
            worker_timeout=run.worker_timeout,
            rank=rank(),
            world_size=world_size(),
            max_bad_share=run.max_bad_share,
            crop=config.crop or self.preprocessing.resize_mode,
            interpolation=self.preprocessing.interpolation,
        )

    def batches(
        self, stage: Stage, batch_size: int, position: int, stopping: Callable[[], bool]
    ) -> Iterator[LabelBatch]:
        """Return batches of labelled images."""
        self.loader.configure(batch_size=batch_size, image_size=stage.image_size)
        return self.loader.batches(position, stopping=stopping)

    def enter_stage(self, stages: Sequence[Stage]) -> None:
        """Give the tower the image size and window of the stage; a new window makes new bias tables."""
        windows = [stage.window_size for stage in stages if stage.window_size]
        self.model.set_input_size(img_size=stages[-1].image_size, window_size=windows[-1] if windows else None)

    @annotated("train.prepare")
    def prepare(self, batch: LabelBatch, stage: Stage, step: int) -> tuple[Tensor, Tensor]:
        """Return augmented images (B, 3, S, S), and their classes: int64 (B,), or shares (B, K) where images mix."""
        images = batch.images.to(self.device, non_blocking=True)
        images = self.augment(images, stage.image_size, seed_of_rank(self.run.seed), step).to(input_dtype(self.model))
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.config.mixup:
            alpha = torch.tensor(self.config.mixup, device="cpu")
            share = torch.distributions.Beta(alpha, alpha).sample().item()  # seeded by (seed, step, rank)
            targets = F.one_hot(labels, self.model.config.num_classes).float()
            return torch.lerp(images.flip(0), images, share), torch.lerp(targets.flip(0), targets, share)
        return images, labels

    def loss(self, batch: LabelBatch, stage: Stage, step: int) -> Tensor:
        """Return the cross-entropy."""
        images, targets = self.prepare(batch, stage, step)
        return F.cross_entropy(self.module(images).float(), targets, label_smoothing=self.config.label_smoothing)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups whose learning rates fall towards the input, if ``layer_decay`` says so."""
        decay = self.config.layer_decay
        return parameter_groups(self.model, None if decay == 1 else layer_decay(self.model.layer_numbers(), decay))

    def metadata(self) -> Mapping[str, str]:
        """Return configuration, classes and preprocessing, so that the weights file can be used alone."""
        config = {CONFIG_KEY: format_json(self.model.config.to_dict())}
        return {**super().metadata(), **config, **classifier_metadata(self.source.classes, self.preprocessing)}

    def evaluators(self) -> Sequence[Evaluator]:
        """Return what measures top-1 and mean per class on the validation images, if there are any."""
        return () if self.validation is None else (_Accuracy(self, self.validation),)

    def describe_data(self) -> Mapping[str, Any]:
        """Say what the data must agree on: the number of images, and their classes."""
        facts = repr((self.source.classes, self.source.labels)).encode("utf-8", "backslashreplace")
        digest = hashlib.sha256(facts)
        return {"images": len(self.source), "classes": len(self.source.classes), "digest": digest.hexdigest()[:12]}


class _Accuracy:
    """Measures a task's model on images that it does not train on."""

    def __init__(self, task: ClassificationTask, source: ClassFolders) -> None:
        self.task, self.source = task, source

    def run(self, model: nn.Module) -> dict[str, float | int]:
        """Return "top1", "mean_per_class" and so on, at the image size of the stage."""
        task = self.task
        transform = task.preprocessing.transform(task.model.config.img_size)
        precision, share = task.run.precision, task.run.max_bad_share
        return classification(model, self.source, transform, precision=precision, max_bad_share=share)


def _freeze_all_but_head(tower: ImageTower) -> None:
    """Leave the head alone trainable, and what the tower computes without chance."""
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    tower.disable_drop_path()
