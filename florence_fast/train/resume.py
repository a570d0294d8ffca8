"""Resume a run: checks that a checkpoint is complete and belongs to the run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_fast.precision import check_same_weights
from florence_fast.train.config import RunConfig
from florence_fast.train.differences import differences
from florence_fast.train.reproducible import warn_of_differences

CHECKPOINT_FORMAT = 1
_BEFORE_TASKS = "contrastive"
"""The only task of checkpoints that name none."""
_ENTRIES = ("counters", "stage", "model", "optimizer", "scaler", "ema", "rng", "config", "model_config", "environment")


class ResumeError(ValueError):
    """A checkpoint is whole, but this run cannot go on from it: it belongs to another model, config or version."""


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong when a checkpoint is taken over into one line that names it.

    Raises:
        ResumeError: the ``with`` block raised it, another ValueError, or what entries of wrong types lead to.
    """
    try:
        yield
    except ValueError as error:
        raise ResumeError(f"this run cannot go on from {path}: {error}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ResumeError(f"this run cannot go on from {path}, whose entries do not fit it: {reason}") from error


def check_entries(state: Any) -> None:
    """Refuse what is not a checkpoint of this version's trainer.

    Raises:
        ResumeError: it is of another format, or an entry is missing.
    """
    if not isinstance(state, dict) or "format" not in state:
        raise ResumeError("it was not written by this trainer: it has no entry 'format'")
    if state["format"] != CHECKPOINT_FORMAT:
        raise ResumeError(f"it has format {state['format']!r}, and this version reads format {CHECKPOINT_FORMAT}")
    if missing := [name for name in _ENTRIES if name not in state]:
        raise ResumeError(f"it lacks {', '.join(missing)}")


def settings_of(state: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint in the layout of ``defaults``, those of the run's task nested.

    Checkpoints of earlier versions hold the task's settings beside the run's. A setting that they lack is one that
    came later, and they had what is its default now.

    Raises:
        ResumeError: the checkpoint belongs to another task.
    """
    saved = dict(state["config"])
    nested = dict(saved.pop("task", {"name": _BEFORE_TASKS}))
    task = defaults["task"]
    if nested["name"] != task["name"]:
        raise ResumeError(f"it belongs to the task {nested['name']}, and this run's is {task['name']}")
    nested |= {name: saved.pop(name) for name in task if name in saved}
    return {**defaults, **saved, "task": {**task, **nested}}


def check_settings(
    state: Mapping[str, Any], config: RunConfig, own: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that settings do not let the run go on from, and name every setting that differs.

    Args:
        state: the checkpoint.
        config: of the run.
        own: all settings of the run, those of its task nested.
        defaults: the same, with the default of every setting that has one.

    Raises:
        ResumeError: another task, a stage that the run does not have, or a step behind its end.
        ValueError: the weights were kept in another dtype.
    """
    check_entries(state)
    earlier = settings_of(state, defaults)
    check_schedule(state, config)
    check_same_weights(earlier["precision"], config.precision)
    warn_of_differences("setting", schedule(earlier), schedule(own))


def check_schedule(state: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse a checkpoint from behind the end of the run, or of a stage that the run does not have.

    Raises:
        ResumeError: both schedules are named.
    """
    step, stage, stages = state["counters"]["step"], state["stage"], state["config"]["stages"]
    if stage is not None and stage >= len(config.stages):
        raise ResumeError(
            f"it belongs to stage {stage + 1} of {len(stages)}, and this run has only {len(config.stages)}: "
            "give the stages of the checkpoint's run, or start a new run from its weights"
        )
    if step > config.total_steps:
        raise ResumeError(f"it was written after step {step}, and this run ends at step {config.total_steps}")


def check_tensors(state: Mapping[str, Any], own: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse the weights of another model.

    Args:
        state: the checkpoint.
        own: the run's tensors by name, in the shapes of the checkpoint's stage.
        config: of the run's model.

    Raises:
        ResumeError: names or shapes differ; the model's settings that differ are named, or else the tensors.
    """
    saved = state["model"]
    missing, unknown = [name for name in own if name not in saved], [name for name in saved if name not in own]
    reshaped = [name for name in own if name in saved and saved[name].shape != own[name].shape]
    if not (missing or unknown or reshaped):
        return
    causes = [f"{name} {a!r}, here {b!r}" for name, a, b in differences(state["model_config"], config)]
    causes += [f"{name} {tuple(saved[name].shape)}, here {tuple(own[name].shape)}" for name in reshaped]
    causes += [f"{name} is missing in it" for name in missing] + [f"{name} is only in it" for name in unknown]
    more = f"; and {len(causes) - 4} more" if len(causes) > 4 else ""
    raise ResumeError(f"it holds another model: {'; '.join(causes[:4])}{more}")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf."""
    with torch.no_grad():
        floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        return [name for name, tensor in floating.items() if not tensor.isfinite().all()]


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's entries with what follows from them for the learning rate: its length and warm-up."""
    steps = sum(stage["steps"] for stage in config["stages"])
    warmup = config["warmup"]
    return {**config, "total_steps": steps, "warmup_steps": max(1, steps // 20) if warmup is None else warmup}
