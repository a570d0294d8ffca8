"""A training run of seconds, as functions for tests and as a program for their child processes.

It has what could break an equality to the bit: 24 heads in one stage, drop path, augmented images and texts, a
moving average, epochs that end inside a batch, and a border between stages where batch, image and window change.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from florence_fast.data.augment import BatchAugment
from florence_fast.data.pairs import PairSource, open_pairs
from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.models.florence import Florence
from florence_fast.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from florence_fast.train.config import RunConfig, Stage, split_settings
from florence_fast.train.engine import Trainer

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_LENGTH = 12
START, END = 128, 129
SHADES = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 50, 200), "white": (240,) * 3, "black": (9,) * 3}
STAGES = (
    Stage(steps=7, image_size=16),
    Stage(steps=5, image_size=32, augment_text=False, batch_size=36, window_size=3),
)
SETTINGS = {
    "batch_size": 32,
    "precision": "fp32",
    "lr": 3e-3,
    "warmup": 2,
    "ema_decay": 0.9,
    "log_every_n_steps": 1,
    "save_every_steps": 3,
    "progress": False,
    "tensorboard": False,
}


def tiny_model(drop_path_rate: float = 0.2) -> Florence:
    """Return a Florence of 20 thousand parameters, the same at every call."""
    torch.manual_seed(0)
    image = ImageConfig("coswin", 24, (1, 2), (3, 24), img_size=16, window_size=2, drop_path_rate=drop_path_rate)
    text = TextConfig(width=16, heads=2, layers=1, vocab_size=130, context_length=CONTEXT_LENGTH)
    return Florence(FlorenceConfig(image, text, embed_dim=16, image_mean=(0.5,) * 3, image_std=(0.25,) * 3))


def tokenizer(texts: list[str]) -> torch.Tensor:
    """Turn texts into their characters' codes between start and end, zero padded."""
    tokens = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        codes = [START, *(ord(character) % 127 + 1 for character in text[: CONTEXT_LENGTH - 2]), END]
        row[: len(codes)] = torch.tensor(codes)
    return tokens


def write_pairs(folder: Path, count: int = 80) -> Path:
    """Write ``count`` noisy images of five colours with names and keywords, and return their table."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = list(SHADES)[number % len(SHADES)]
        pixels = np.clip(draw.normal(SHADES[name], 25, size=(32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": name, "short_name": name[:2], "keywords": [f"{name} one"]})
    table = folder / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def tiny_trainer(pairs: Path | PairSource, out_dir: Path, **settings: Any) -> Trainer:
    """Return a trainer; settings that neither the run nor the task knows go to `Trainer`."""
    model = settings.pop("model", None) or tiny_model()
    extras = {name: settings.pop(name) for name in ("on_interval", "generators", "about") if name in settings}
    augment = settings.pop("augment", BatchAugment(model.config.image_mean, model.config.image_std))
    evaluators = settings.pop("evaluators", ())
    run, task = split_settings({"stages": STAGES, **SETTINGS, **settings}, ContrastiveConfig)
    source = open_pairs(pairs) if isinstance(pairs, Path) else pairs
    config = ContrastiveConfig(**task)
    task = ContrastiveTask(model, tokenizer, source, config, augment=augment, evaluators=evaluators)
    return Trainer(task, RunConfig(**run), out_dir, **extras)


def losses(out_dir: Path, after: int = 0) -> dict[int, str]:
    """Return what every later step must agree on to the bit, written exactly, by step."""
    lines = (out_dir / "checkpoints" / "results.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > after]
    return {r["step"]: " ".join(r[key].hex() for key in ("loss", "grad_norm", "logit_scale", "lr")) for r in records}


def start_child(pairs: Path, out_dir: Path, *arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """Start `main` in a process of its own.

    Its threads sleep while they wait: threads that spin take 20 times as long when other processes want the cores.
    """
    command = [sys.executable, "-m", "tests.train.tiny_run", str(pairs), str(out_dir), "--threads", str(threads)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def main() -> None:
    """Run or resume in this process; the last line printed is the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = tiny_trainer(arguments.pairs, arguments.out_dir, **arguments.settings)
    print(json.dumps(trainer.run(resume=arguments.resume)))


if __name__ == "__main__":
    main()
