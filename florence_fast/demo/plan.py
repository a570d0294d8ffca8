"""How long a demo takes on this machine, and how many steps fit into the minutes that are given."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from florence_fast.data.pair_loader import PairBatch
from florence_fast.data.pairs import PairSource
from florence_fast.demo.recipe import EVALUATIONS
from florence_fast.files import write_json
from florence_fast.models.florence import Florence
from florence_fast.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from florence_fast.tasks.images import Augment
from florence_fast.text_files import read_json
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.state import TrainState, prepare

# Counted in steps of the same image size: a forward pass over the test set and its names, and what follows training.
EVALUATION = 6.0
ENDING = 4 * EVALUATION
TIMED_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, as they were chosen when the run began; a resumed run keeps them.

    Args:
        recipe: its name.
        steps: of each stage.
        minutes: what was asked for; None for the recipe's own number of steps.
    """

    recipe: str
    steps: tuple[int, ...]
    minutes: float | None = None

    def stages(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Return ``stages`` with the steps of this plan."""
        return tuple(replace(stage, steps=steps) for stage, steps in zip(stages, self.steps, strict=True))

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path, recipe: str, stages: int) -> "Plan":
        """Read the plan of a run that is resumed.

        Raises:
            ValueError: the file is no plan, or one of another recipe.
        """
        found = read_json(path)
        steps = found.get("steps") if isinstance(found, dict) else None
        if not isinstance(steps, list) or not all(type(step) is int and step > 0 for step in steps):
            raise ValueError(f"{path} is not the plan of a demo; delete it to start again")
        if found.get("recipe") != recipe or len(steps) != stages:
            raise ValueError(f"{path.parent} holds a run of the recipe {found.get('recipe')!r}, wanted {recipe!r}")
        return cls(recipe, tuple(steps), found.get("minutes"))


def make_plan(recipe: str, config: RunConfig, seconds: Mapping[int, float], minutes: float | None) -> Plan:
    """Choose the steps of each stage: those of ``config``, or as many as fit into ``minutes``."""
    if minutes is None:
        return Plan(recipe, tuple(stage.steps for stage in config.stages))
    return Plan(recipe, steps_in(minutes, config, seconds, EVALUATIONS), minutes)


def measure_speed(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    texts: list[str],
    run: RunConfig,
    config: ContrastiveConfig,
    augment: Augment | None,
) -> dict[int, float]:
    """Time a training step at each image size of ``run``, on a copy of the model.

    Returns:
        Seconds of a step by image size.
    """
    seconds = {}
    for size in {stage.image_size for stage in run.stages}:
        trained = copy.deepcopy(model).train()
        trained.set_input_size(img_size=size)
        # Nothing is read: the batch is given.
        task = ContrastiveTask(trained, tokenizer, cast(PairSource, ()), config, augment=augment)
        prepare(task, run)
        state = TrainState(task, run)
        numbers = torch.arange(run.batch_size)
        captions = [texts[int(number) % len(texts)] for number in numbers]
        images = torch.zeros(run.batch_size, 3, size, size, dtype=torch.uint8)
        batch = PairBatch(images=images, texts=captions, labels=numbers, indices=numbers, skipped=0)
        times = []
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            state.take_step(batch, Stage(steps=1, image_size=size))
            times.append(time.perf_counter() - start)
        seconds[size] = min(times[1:])
    return seconds


def predict_seconds(config: RunConfig, seconds: Mapping[int, float], evaluate_every: int, done: int = 0) -> float:
    """Predict what the steps after ``done``, the evaluations and the end take, in seconds."""
    total, first = 0.0, 0
    for stage in config.stages:
        last = first + stage.steps
        steps = max(0, last - max(first, done))
        evaluations = last // evaluate_every - max(first, done) // evaluate_every if steps else 0
        total += seconds[stage.image_size] * (steps + EVALUATION * evaluations)
        first = last
    return total + seconds[config.stages[-1].image_size] * ENDING


def steps_in(minutes: float, config: RunConfig, seconds: Mapping[int, float], evaluations: int) -> tuple[int, ...]:
    """Choose the steps of each stage so that the demo takes ``minutes``; their proportions stay."""
    last = config.stages[-1].image_size
    spent = (ENDING + EVALUATION * evaluations) * seconds[last]
    training = sum(stage.steps * seconds[stage.image_size] for stage in config.stages)
    factor = max(0.0, 60 * minutes - spent) / training
    return tuple(max(1, round(factor * stage.steps)) for stage in config.stages)


def say_minutes(seconds: float) -> str:
    """Say a duration as people do.

    >>> say_minutes(431)
    'about 7 minutes'
    """
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return "about a minute" if minutes == 1 else f"about {minutes} minutes"
