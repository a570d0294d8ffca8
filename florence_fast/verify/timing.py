"""Timed calls: forward, backward, or both, of one function on one set of tensors."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from florence_fast.ops.cases import Function, each
from florence_fast.timing import Call

MODES = ("forward", "backward", "both")


def call_in_mode(
    function: Function, tensors: Mapping[str, Tensor], grad_out: Tensor | tuple[Tensor, ...] | None, mode: str
) -> Call:
    """Return a call without arguments that runs ``function(**tensors)`` in one of ``MODES``.

    "forward" is without a graph, as in inference; "backward" walks one graph again and again.
    """
    leaves = {name: x.detach().requires_grad_(mode != "forward") for name, x in tensors.items()}

    def grads_of(outs: tuple[Tensor, ...]) -> list[Tensor]:
        return [grad.to(out.dtype) for grad, out in zip(each(cast(Tensor, grad_out)), outs, strict=True)]

    def forward() -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return function(**leaves)

    def both() -> tuple[Tensor, ...]:
        outs = each(function(**leaves))
        return torch.autograd.grad(outs, list(leaves.values()), grads_of(outs))

    if mode != "backward":
        return {"forward": forward, "both": both}[mode]
    outs = each(function(**leaves))
    grads = grads_of(outs)
    return lambda: torch.autograd.grad(outs, list(leaves.values()), grads, retain_graph=True)
