"""What verification runs: for each op a few small cases to be checked, one larger case to be timed, and its rivals.

A rival computes the same thing in the way that a model without this package does; it gets the same tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Results = dict[str, Tensor]


@dataclass
class Inputs:
    """One draw: what the op and every rival are called with."""

    tensors: dict[str, Tensor]
    """By the op's argument names; each gets a gradient."""
    options: dict[str, Any]
    """The op's other arguments."""
    grad_out: Tensor | tuple[Tensor, ...] | None
    """One for each result; None for an op without a gradient."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a model computes once and keeps, such as the mask of a shift; for the rivals."""
    smaller: "Inputs | None" = None
    """A draw that float64 can afford where it cannot afford this one, and whose results say what those of this are."""
    enlarged: Callable[[Results], Results] = dict
    """From the results of ``smaller`` to those of this draw."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


@dataclass(frozen=True)
class Case:
    """One size of one op."""

    name: str
    make: Callable[[torch.dtype, str, int], Inputs]
    """``make(dtype, device, seed)``."""


@dataclass(frozen=True)
class Subject:
    """One op with its cases and its rivals."""

    op: str
    checked: tuple[Case, ...]
    timed: dict[str, Case]
    """Device type -> the case whose time is taken there."""
    rivals: dict[str, Callable[[Inputs], Function]]
    """Name -> ``build(inputs)``, which returns a function of the tensors. "eager" is the plain computation."""


def subjects() -> dict[str, Subject]:
    """Return what is verified, by the name of the op."""
    from florence_fast.verify import (
        contrastive_loss,
        deform_conv2d,
        merging,
        rows,
        window_attention,
        window_attention_partitioned,
    )

    known = (
        window_attention.SUBJECT,
        window_attention_partitioned.SUBJECT,
        contrastive_loss.SUBJECT,
        contrastive_loss.SIGMOID,
        deform_conv2d.SUBJECT,
    )
    known += (*rows.SUBJECTS, *merging.SUBJECTS)
    return {subject.op: subject for subject in known}


def each(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results of an op that has one or several."""
    return x if isinstance(x, tuple) else (x,)


def generator(device: str, seed: int) -> torch.Generator:
    """Return a seeded source of random numbers on ``device``."""
    return torch.Generator(device).manual_seed(seed)
