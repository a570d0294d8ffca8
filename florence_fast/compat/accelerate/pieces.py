"""Shared by the replacements for all libraries' layers: each piece runs by our op or by its own module.

A module is called as it is as soon as anything hangs on it that reading its weights would pass over: hooks, another
forward, LoRA, quantised weights. That is asked at every call, since all of it can come later.

B batch · C channels
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate.options import Options
from florence_fast.models.layers import is_plain

Classes = Set[tuple[str, str]]
"""Module and name of each."""
LAYER_PARTS = ("attention", "mlp", "norm")
"""The options that a layer of attention, norms and feed-forward in one forward looks at."""


class StandIn(NamedTuple):
    """What a forward of ours asks of the layers into which it is put."""

    arguments: tuple[str, ...]
    """Of the forward that it stands in for."""
    reasons: Callable[[nn.Module, Options], Iterable[str]]
    """Why it cannot be put into a layer that takes these arguments; AttributeError if the layer has other parts."""


def switched_off(options: Options, *parts: str) -> str | None:
    """Say that none of these parts of a module was asked for; None if one was."""
    if any(getattr(options, part) for part in parts):
        return None
    return f"left as it is by {', '.join(f'{part}=False' for part in parts)}"


def known_class(module: nn.Module, classes: Classes) -> type | None:
    """Return the first class of ``module``'s that is among those of a library; None if it has none of them."""
    return next((cls for cls in type(module).__mro__ if (cls.__module__, cls.__name__) in classes), None)


def stand_in(
    module: nn.Module,
    layers: Classes,
    merges: Classes,
    forwards: Mapping[Callable[..., Any], StandIn],
    options: Options,
    library: str,
) -> Callable[..., Any] | str:
    """Choose the forward for a module of one of these classes, or of one made from it, or say why none can serve."""
    known = known_class(module, layers | merges)
    is_merge = (known.__module__, known.__name__) in merges
    unasked = switched_off(options, *(("merging",) if is_merge else LAYER_PARTS))
    if unasked is not None:
        return unasked
    theirs = inspect.unwrap(type(module).forward)
    if theirs is not inspect.unwrap(known.forward):
        return f"{type(module).__name__} has a forward of its own"
    names = tuple(inspect.signature(theirs).parameters)[1:]
    ours = next((forward for forward, wanted in forwards.items() if wanted.arguments == names), None)
    if ours is None:
        return f"a version of {library} whose forward takes other arguments: {', '.join(names)}"
    try:
        reason = next(iter(forwards[ours].reasons(module, options)), None)
    except AttributeError as error:
        return f"a version of {library} with other parts: {error}"
    return partial(ours, options=options) if reason is None else reason


def untouched(library: str, *modules: nn.Module) -> bool:
    """Say whether these modules, of a type that ``library`` or PyTorch defines, may be passed over.

    Nothing hangs on them nor on their own parameters. An adapter's wrapper is of another type, though it may show the
    parts of what it wraps as its own.
    """
    owners = (f"{library}.", "torch.nn.")
    types = {type(module) for module in modules}
    return all(t.__module__.startswith(owners) for t in types) and is_plain(*modules, kinds=tuple(types))


def linear_reasons(what: str, *linears: nn.Module) -> Iterable[str]:
    """Say why the weights of these modules cannot be read."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            yield f"{what} must come from plain nn.Linear, got {type(linear).__name__}"
        elif type(linear.weight) is not nn.Parameter:
            got = type(linear.weight).__name__
            hint = ": accelerate the model before fully_shard" if got == "DTensor" else ""
            yield f"the weights of {what} must be plain parameters, got {got}{hint}"


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module, kinds=(nn.Linear,)) else module(x)


def joined_linear(x: Tensor, linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """Return what plain linears make of ``x``, side by side, and their biases; None if none of them has one.

    The weights are joined at every call, so that they stay parameters of their own. Joining the three results of q, k
    and v instead took 1.0 to 1.4 times as long in the stages of Swin-T at batch 8 on a CPU (float32, bf16, autocast and
    with backward; 0.94 at the least). It is faster where the rows are fewer than the channels: 0.4 at batch 1 and 49
    rows.
    """
    bias = None
    if any(linear.bias is not None for linear in linears):
        zeros = (
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
        )
        bias = torch.cat(list(zeros))
    return ops.linear(x, torch.cat([linear.weight for linear in linears]), bias), bias


def norm(module: nn.Module, x: Tensor, options: Options) -> Tensor:
    """Return ``module(x)``."""
    if options.norm and is_plain(module, kinds=(nn.LayerNorm,)):
        return ops.layer_norm(x, module.weight, module.bias, eps=module.eps)
    return module(x)


def add_and_norm(
    residual: Tensor, branch: Tensor, drop_path: nn.Module, module: nn.Module, options: Options
) -> tuple[Tensor, Tensor]:
    """Return ``residual + drop_path(branch)`` and ``module`` of it."""
    if options.norm and is_plain(module, kinds=(nn.LayerNorm,)) and _only_drops_samples(drop_path):
        factors = _drop_path_factors(drop_path, branch)
        return ops.layer_norm(
            branch, module.weight, module.bias, eps=module.eps, residual=residual, residual_scale=factors
        )
    total = residual + drop_path(branch)
    return total, norm(module, total, options)


def _only_drops_samples(drop_path: nn.Module) -> bool:
    """Say whether this is a drop path as libraries write it, or none."""
    kept = getattr(drop_path, "scale_by_keep", True)
    is_one = type(drop_path).__name__.endswith("DropPath") and isinstance(getattr(drop_path, "drop_prob", None), float)
    known = type(drop_path) is nn.Identity or (is_one and kept)
    return known and is_plain(drop_path, kinds=(type(drop_path),))


def _drop_path_factors(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    """Draw what the branch of each sample is multiplied with, (B,), by the same draw as theirs; None for all ones."""
    probability = getattr(drop_path, "drop_prob", 0.0)
    if not drop_path.training or probability == 0.0:
        return None
    drawn = drop_path(branch.new_ones(len(branch), *[1] * (branch.ndim - 1))).flatten()
    # in float32, as 1/keep rounded to the dtype of a 16-bit branch would be off in the same direction everywhere
    return (drawn != 0).to(torch.float32) / (1 - probability) if drawn.dtype != torch.float64 else drawn


def mlp(x: Tensor, first: nn.Module, activation: nn.Module, second: nn.Module) -> Tensor | None:
    """Return linear, activation, linear by one op; None if one of them has to be called."""
    name = _activation(activation)
    if name is None or not is_plain(first, second, kinds=(nn.Linear,)):
        return None
    return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, activation=name)


_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "QuickGELUActivation": "quick_gelu"}


def _activation(module: nn.Module) -> str | None:
    """Name the activation that a module computes, as `ops.mlp` calls it; None if it has no such name."""
    if not is_plain(module, kinds=(type(module),)):
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    name, act = type(module).__name__, getattr(module, "act", None)
    if type(module).__module__ != "transformers.activations":
        return None
    if name == "GELUActivation":
        return "gelu" if act is F.gelu else None
    # what else transformers writes out in Python is left to it: it rounds at other places
    return _ACTIVATIONS.get(name) if act is None or isinstance(act, partial) else None


@cache
def warn_of_weights(what: str) -> None:
    """Warn, once for each ``what``, that a call asked for something that only their attention can do."""
    warnings.warn(f"{what}: these layers run their own forward in such calls, at its speed", stacklevel=2)


@cache
def warn_of_dropout(setting: str) -> None:
    """Warn, once for each ``setting``, that attention in training is not ours."""
    warnings.warn(
        f"{setting} drops attention weights in training, which the kernels cannot: these layers run their own forward "
        "until model.eval(); set it to 0 to train on the kernels",
        stacklevel=2,
    )
