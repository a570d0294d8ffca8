"""Evaluation during a run: when, and with which weights."""

import logging
from contextlib import nullcontext
from typing import Any

from florence_fast.train.config import RunConfig
from florence_fast.train.ema import EMA
from florence_fast.train.task import Task

logger = logging.getLogger(__name__)


def is_measured(task: Task, run: RunConfig, step: int) -> bool:
    """Say whether the task's evaluators run after ``step``: every ``evaluate_every_steps``, and at the end."""
    every = run.evaluate_every_steps
    due = step == run.total_steps or (every is not None and step % every == 0)
    return due and bool(task.evaluators())


def measure(task: Task, ema: EMA | None) -> dict[str, Any]:
    """Run the task's evaluators on the weights for use: their moving average where one is kept."""
    figures: dict[str, Any] = {}
    with nullcontext() if ema is None else ema.swapped(task.model):
        for evaluator in task.evaluators():
            figures |= evaluator.run(task.model)
    shown = (f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float | int))
    logger.info("evaluated: %s", ", ".join(shown))
    return figures
