"""Progress counters of a run, which a checkpoint carries besides tensors."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Counters:
    """Steps, samples, and the sums of the interval that is still open.

    Args:
        step: optimiser steps taken, skipped ones included.
        position: samples consumed by all ranks.
        seconds: seconds of training, without evaluations.
        skipped_steps, skipped_in_a_row: steps given up for NaN or Inf, in all and since the last good one.
        bad_samples: samples that could not be read and were replaced, on this rank.
        loss_sum, loss_count: over the good steps of the open interval.
        loss, last_loss, grad_norm: mean of the last closed interval; values of the last good step.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    loss: float = math.nan
    last_loss: float = math.nan
    grad_norm: float = math.nan

    def good_step(self, loss: float, grad_norm: float) -> None:
        """Count a step that changed the weights."""
        self.skipped_in_a_row = 0
        self.loss_sum += loss
        self.loss_count += 1
        self.last_loss, self.grad_norm = loss, grad_norm

    def skipped_step(self) -> None:
        """Count a step that was given up."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def close_interval(self) -> None:
        """Take the mean of the open interval and open the next one."""
        self.loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.loss_sum, self.loss_count = 0.0, 0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)
