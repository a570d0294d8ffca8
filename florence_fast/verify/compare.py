"""Compare values and gradients with float64, relative to the error of a plain computation in the same dtype.

A result passes when it is at most twice as far from the float64 reference as the plain computation in the same dtype,
a gradient three times: what a precision cannot do is asked of nobody, what it can do is. Beyond ``CEILINGS`` nothing
passes, however far off the plain computation is: two absurd results that agree in that are no proof.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from florence_fast.ops.cases import Function, each

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

CEILINGS = {torch.float64: 1e-6, torch.float32: 0.01, torch.float16: 0.2, torch.bfloat16: 0.2}
"""The most that any error may be, by the coarsest dtype of the results.

Several times what rounding leaves: of 2,048 pairs or 32 windows at most 0.05 in 16 bits, where a gradient underflows
in float16, and 3e-6 in float32, whose products may be in TF32. A kernel that leaves out a term, a shift or a bias is
farther off.
"""


@dataclass(frozen=True)
class Judgement:
    """One result against float64: relative errors in the Euclidean norm, and the most that is allowed."""

    name: str
    error: float
    plain_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN never is."""
        return self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "passed": self.passed}


def results(
    function: Function,
    tensors: Mapping[str, Tensor],
    grad_out: Tensor | tuple[Tensor, ...] | None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run forward and, if there is a gradient, backward.

    Args:
        function: takes ``tensors`` by name.
        tensors: floating, each gets a gradient.
        grad_out: the gradient of the result, or of each of several; None for an op without one.
        dtype: cast ``tensors`` first, e.g. to float64 for the reference.

    Returns:
        ``out``, or ``out0`` and ``out1``, and ``dNAME`` for each of ``tensors``. Integers come as float64.
    """
    leaves = {name: x.detach().to(dtype or x.dtype) for name, x in tensors.items()}
    if grad_out is None:
        return _named(each(function(**leaves)))
    for leaf in leaves.values():
        leaf.requires_grad_()
    outs = each(function(**leaves))
    grads_out = [grad.to(out.dtype) for grad, out in zip(each(grad_out), outs, strict=True)]
    grads = torch.autograd.grad(outs, list(leaves.values()), grads_out)
    return _named(outs) | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _named(outs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    values = [out.detach() if out.is_floating_point() else out.double() for out in outs]
    return {"out": values[0]} if len(values) == 1 else {f"out{i}": value for i, value in enumerate(values)}


def judge(found: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> list[Judgement]:
    """Compare what was ``found`` with the ``exact`` float64 results, and so with the ``plain`` ones, name by name."""
    judgements = []
    ceiling = max((CEILINGS[x.dtype] for x in plain.values()), default=0.0)
    for name, wanted in exact.items():
        factor = FORWARD_FACTOR if name.startswith("out") else GRADIENT_FACTOR
        error, plain_error = (relative_error(x[name], wanted) for x in (found, plain))
        # The plain result of a lucky draw may be nearer than rounding: one rounding of the result is always allowed.
        limit = min(factor * max(plain_error, rounding(plain[name])), ceiling)
        judgements.append(Judgement(name, error, plain_error, limit))
    return judgements


def joined(draws: Iterable[list[Judgement]]) -> list[Judgement]:
    """Join the judgements of several seeds into one of each result, by root mean square."""
    columns = zip(*draws, strict=True)
    return [
        Judgement(column[0].name, *(_rms([getattr(j, field) for j in column]) for field in _FIELDS))
        for column in columns
    ]


_FIELDS = ("error", "plain_error", "limit")


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return ||x - exact|| / ||exact||; infinite where the shapes differ."""
    if x.shape != exact.shape:
        return math.inf
    norm = exact.norm()
    return ((x.to(exact.dtype) - exact).norm() / norm.clamp_min(torch.finfo(exact.dtype).tiny)).item()


def rounding(x: Tensor) -> float:
    """Return the relative error that the dtype of ``x`` asks for whatever plain PyTorch's is: of many numbers, about
    that of rounding; of a single one, a sum that may come out exact by luck, four roundings.
    """
    return torch.finfo(x.dtype).eps * (0.25 if x.numel() > 1 else 4)


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))
