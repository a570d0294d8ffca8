"""Every task on eight images of eight classes, as functions for tests and as a program that is killed.

A new task gets a function here and a line in BUILD; `test_every_task.py` then holds it to what all tasks promise.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from florence_fast.data.class_folders import ClassFolders
from florence_fast.data.pairs import open_pairs
from florence_fast.models.config import ImageConfig
from florence_fast.models.coswin import CoSwin
from florence_fast.tasks import ClassificationConfig, ClassificationTask, ContrastiveConfig, ContrastiveTask
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.engine import Trainer
from florence_fast.train.task import Task
from tests.train.tiny_run import tiny_model, tokenizer

CLASSES = ("amber", "blue", "green", "lilac", "olive", "red", "teal", "white")
STAGES = (Stage(4, 16), Stage(3, 32, batch_size=6, window_size=3))
SETTINGS = {"batch_size": 8, "precision": "fp32", "lr": 3e-3, "warmup": 2, "weight_decay": 0.0, "ema_decay": 0.9}
QUIET = {"log_every_n_steps": 1, "save_every_steps": 2, "progress": False, "tensorboard": False}


def write_images(folder: Path, *, broken: bool = False) -> Path:
    """Write one noisy image a class; ``broken`` adds a file that only says it is an image."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        shade = [255 * (number >> bit & 1) for bit in range(3)]
        pixels = np.clip(draw.normal(shade, 25, size=(32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / "0.png")
    if broken:
        (folder / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more than a beginning")
    return folder


def contrastive(folder: Path, drop_path: float, augment: bool) -> ContrastiveTask:
    """Return contrastive pretraining on images with the names of their folders."""
    config = ContrastiveConfig(loss="clip", augment=augment, keyword_prob=0.0, template_prob=0.0)
    return ContrastiveTask(tiny_model(drop_path), tokenizer, open_pairs(folder), config)


def classification(folder: Path, drop_path: float, augment: bool) -> ClassificationTask:
    """Return fine-tuning on class folders; chance (mixup) only where augmentation is."""
    torch.manual_seed(0)
    image = ImageConfig("coswin", 24, (1, 2), (3, 24), img_size=16, window_size=2, drop_path_rate=drop_path)
    source = ClassFolders(folder)
    tower = CoSwin(replace(image, num_classes=len(source.classes)))
    chance = {"mixup": 0.4, "label_smoothing": 0.1} if augment else {}
    return ClassificationTask(tower, source, ClassificationConfig(augment=augment, layer_decay=0.9, **chance))


BUILD: dict[str, Callable[[Path, float, bool], Task]] = {
    "contrastive": contrastive,
    "classification": classification,
}


def tiny_trainer(
    name: str, folder: Path, out_dir: Path, *, drop_path: float = 0.0, augment: bool = False, **settings: Any
) -> Trainer:
    """Return a trainer of the task ``name``; settings are the run's, or ``on_interval``."""
    on_interval = settings.pop("on_interval", None)
    run = RunConfig(**{"stages": STAGES, **SETTINGS, **QUIET, **settings})
    return Trainer(BUILD[name](folder, drop_path, augment), run, out_dir, on_interval=on_interval)


def kill_at(step: int) -> Callable[[Trainer, dict[str, Any]], None]:
    """Return a callback that kills this process, without any chance to save, after ``step``."""

    def kill(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def main(name: str, folder: str, out_dir: str, step: str) -> None:
    """Train on one thread until the kill."""
    torch.set_num_threads(1)
    options = {"drop_path": 0.2, "augment": True, "on_interval": kill_at(int(step))}
    tiny_trainer(name, Path(folder), Path(out_dir), **options).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
