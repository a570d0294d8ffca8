"""What the cases of an op are made of: a few small ones to be checked, one larger one to be timed, and its rivals.

Verification, benchmarks and tests find them in ``ops/<op>/cases.py``, whose ``SUBJECTS`` are by the name of the op. A
rival computes the same thing in the way that a model without this package does; it gets the same tensors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Results = dict[str, Tensor]
Make = Callable[[torch.dtype, str, int], "Inputs"]
"""``make(dtype, device, seed)``."""


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
    make: Make

    def given(self, name: str, /, **options: Any) -> "Case":
        """Return the case of another name whose options are these too; a tensor among them gets no gradient."""

        def make(dtype: torch.dtype, device: str, seed: int) -> Inputs:
            inputs = self.make(dtype, device, seed)
            tensors = {key: x for key, x in inputs.tensors.items() if key not in options}
            return Inputs(tensors, inputs.options | options, inputs.grad_out, inputs.prepared)

        return Case(name, make)


@dataclass(frozen=True)
class Subject:
    """One op with its cases and its rivals."""

    op: str
    checked: tuple[Case, ...]
    timed: dict[str, Case]
    """Device type -> the case whose time is taken there."""
    rivals: dict[str, Callable[[Inputs], Function]]
    """Name -> ``build(inputs)``, which returns a function of the tensors. "eager" is the plain computation."""
    small: tuple[Case, ...] = ()
    """Sizes that an interpreter can afford and that fill no tile, with every option once; rivals know the first."""
    empty: Case | None = None
    """A batch of nothing; None where the op refuses that."""
    autocast: tuple[str, ...] = ()
    """The tensors that autocast makes 16-bit before a CPU's backends see them."""


def each(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results of an op that has one or several."""
    return x if isinstance(x, tuple) else (x,)


def generator(device: str, seed: int) -> torch.Generator:
    """Return a seeded source of random numbers on ``device``."""
    return torch.Generator(device).manual_seed(seed)


Draw = Callable[..., Tensor]
"""``normal(*sizes)``."""


def drawn(
    make: Callable[[Draw], dict[str, Tensor]], out: tuple[int, ...], wide: set[str], outs: int = 1
) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for the tensors that ``make(normal)`` draws.

    Those in ``wide`` stay float32, as a model's parameters do.
    """

    def draw(dtype: torch.dtype, device: str, seed: int) -> Inputs:
        source, full = generator(device, seed), torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, device=device, dtype=full)

        tensors = {name: x if name in wide else x.to(dtype) for name, x in make(normal).items()}
        grads_out = tuple(normal(*out).to(dtype) for _ in range(outs))
        return Inputs(tensors, {}, grads_out if outs > 1 else grads_out[0])

    return draw


def row_subject(
    op: str,
    setup: Callable[[int, int], Callable[..., Inputs]],
    plain: Function,
    *others: Case,
    autocast: tuple[str, ...] = (),
) -> Subject:
    """Return the subject of an op on rows of channels, drawn by ``setup(rows, channels)``."""
    checked = tuple(Case(f"{rows}x{channels}", setup(rows, channels)) for rows, channels in ((64, 96), (37, 200)))
    timed = {"cpu": Case("6,272 rows, C=96", setup(6272, 96)), "cuda": Case("401,408 rows, C=96", setup(401408, 96))}
    return Subject(
        op=op,
        checked=checked,
        timed=timed,
        rivals={"eager": lambda inputs: functools.partial(plain)},
        small=(Case("7x24", setup(7, 24)), *others),
        empty=Case("no rows", setup(0, 24)),
        autocast=autocast,
    )


def map_subject(
    op: str, setup: Callable[[int, int, int], Make], plain: Function, *others: Case, autocast: tuple[str, ...] = ()
) -> Subject:
    """Return the subject of an op that makes a map coarser, drawn by ``setup(batch, side, channels)``."""
    return Subject(
        op=op,
        checked=(Case("14x14, C=32", setup(2, 14, 32)), Case("9x9, C=48", setup(1, 9, 48))),
        timed={"cpu": Case("56x56, C=96", setup(2, 56, 96)), "cuda": Case("128 of 56x56, C=96", setup(128, 56, 96))},
        rivals={"eager": lambda inputs: functools.partial(plain, **inputs.options)},
        small=(Case("5x5, C=16", setup(2, 5, 16)), *others),
        empty=Case("no maps", setup(0, 5, 16)),
        autocast=autocast,
    )
