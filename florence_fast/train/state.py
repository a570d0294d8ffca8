"""Mutable state of a run: weights, their fp32 masters, optimiser, loss scale, moving average, counters."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from florence_fast.precision import autocast, cast_weights, gradient_scaler
from florence_fast.ranges import annotate
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.counters import Counters
from florence_fast.train.distributed import agree, rank, world_size
from florence_fast.train.ema import EMA
from florence_fast.train.masters import MasterWeights
from florence_fast.train.optim import carry_state, create_optimizer, learning_rate, set_learning_rate
from florence_fast.train.parallel import wrap
from florence_fast.train.reproducible import seed_step
from florence_fast.train.resume import not_finite
from florence_fast.train.task import Batch, Task

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is NaN or Inf, or the weights have come to hold one."""


def prepare(task: Task, run: RunConfig) -> None:
    """Cast the model's weights to the run's precision and set the task up; comes before the model is wrapped."""
    cast_weights(task.model, run.precision)
    if run.grad_checkpointing:
        recompute = getattr(task.model, "set_grad_checkpointing", None)
        if recompute is None:
            raise ValueError(f"grad_checkpointing: {type(task.model).__name__} cannot recompute its activations")
        recompute(True)
    task.setup(run)


class TrainState:
    """The state of a run, and the one step that changes it.

    Args:
        task: set up by `prepare`; its model is wrapped here.
        run: its precision is one that `resolve_precision` returned.

    Attributes:
        whole: weights, optimiser and counters belong to the same step.
    """

    def __init__(self, task: Task, run: RunConfig) -> None:
        self.task, self.run = task, run
        task.module = wrap(task.model, run.torchcompile)
        self.masters = MasterWeights(task.model, run.precision)
        self.optimizer = create_optimizer(task.parameter_groups(), run, self.masters.named)
        self.scaler = gradient_scaler(run.precision, task.device)
        self.ema = EMA(task.model, run.ema_decay) if run.ema_decay is not None else None
        self.counters = Counters()
        self.whole = True

    def take_step(self, batch: Batch, stage: Stage, stop: bool = False) -> bool:
        """Take one step: gradients, agreement of all ranks, update or skip, counters.

        Args:
            batch: of this rank.
            stage: which the step belongs to.
            stop: whether this rank was asked to stop.

        Returns:
            Whether some rank was asked to stop.

        Raises:
            TrainingDivergedError: more than ``max_skipped_steps`` steps in a row had to be skipped.
        """
        counters = self.counters
        seed_step(self.run.seed, counters.step, rank())
        set_learning_rate(self.optimizer, learning_rate(self.run, counters.step))
        self.optimizer.zero_grad(set_to_none=True)
        with annotate("train.gradients"):
            loss = self.task.backward(batch, stage, counters.step, self.scaler.scale, self._autocast)
        self.masters.take_gradients()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.masters.named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss_value, norm_value, finite, stopping = agree(loss, norm, stop)
        skipped = ""
        self.whole = False
        if finite:
            self._update(parameters, norm)
            counters.good_step(loss_value, norm_value)
        else:
            skipped = self._skip(loss_value, norm_value, batch)
        self.scaler.update()
        counters.step += 1
        counters.position += len(batch) * world_size()
        counters.bad_samples += batch.skipped
        self.whole = True
        # Raised behind a whole step, which can be saved with the good ones before it.
        if counters.skipped_in_a_row > self.run.max_skipped_steps:
            raise TrainingDivergedError(
                f"{counters.skipped_in_a_row} steps in a row were skipped, more than "
                f"max_skipped_steps={self.run.max_skipped_steps}; the last one: {skipped}"
            )
        return stopping

    def _autocast(self) -> Any:
        return autocast(self.run.precision, self.task.device)

    def _update(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        if self.run.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.run.grad_clip_norm, norm)
        with annotate("train.optimizer"):
            self.scaler.step(self.optimizer)
            self.masters.give_weights()
        self.task.after_update()
        if self.ema is not None:
            self.ema.update(self.task.model, self.masters.copies)

    def _skip(self, loss: float, norm: float, batch: Batch) -> str:
        """Count a step without an update, and log and return its cause."""
        counters = self.counters
        counters.skipped_step()
        names = [n for n, p in self.masters.named.items() if p.grad is not None and not p.grad.isfinite().all()]
        cause = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        described = (
            f"step {counters.step} skipped: {cause}; NaN or Inf in the gradients of {len(names)} parameters "
            f"({', '.join(names[:3]) or 'none'}); first samples {batch.describe()}"
        )
        logger.warning("%s", described)
        return described

    def enter_stage(self, number: int) -> None:
        """Let the task prepare for stage ``number``; where it replaces parameters, they get a new optimiser."""
        self.whole = False
        model = self.task.model
        before = set(model.parameters())
        self.task.enter_stage(self.run.stages[: number + 1])
        if set(model.parameters()) != before:
            self.masters = MasterWeights(model, self.run.precision, self.masters)
            optimizer = create_optimizer(self.task.parameter_groups(), self.run, self.masters.named)
            carry_state(self.optimizer, optimizer)
            self.optimizer = optimizer
            if self.ema is not None:
                self.ema.restart_resized(model)
            self.task.module = wrap(model, self.run.torchcompile)
        self.whole = True

    def weights(self) -> dict[str, Tensor]:
        """Return the weights for use, on the CPU: the moving average where one is kept."""
        average = self.ema.average if self.ema is not None else {}
        return {name: x.cpu().contiguous() for name, x in {**self.task.model.state_dict(), **average}.items()}

    def not_finite(self) -> list[str]:
        """Return the names of weights, or of their average, that hold NaN or Inf."""
        names = not_finite(dict(self.task.model.named_parameters()))
        return names or not_finite(self.ema.average if self.ema is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain values."""
        return {
            "counters": self.counters.to_dict(),
            "model": self.task.model.state_dict(),
            "masters": self.masters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, of a model with the same tensors."""
        self.counters = Counters(**state["counters"])
        self.task.model.load_state_dict(state["model"])
        self.masters.load_state_dict(state.get("masters", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if (self.ema is None) != (state["ema"] is None):
            logger.warning("the moving average of the weights is %s", "dropped" if self.ema is None else "started here")
        elif self.ema is not None:
            self.ema.load_state_dict(state["ema"])
