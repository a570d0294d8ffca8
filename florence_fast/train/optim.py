"""AdamW with parameter groups for weight decay, and the learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from florence_fast.train.config import RunConfig


def split_by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the trainable parameters into those that weight decay shrinks and those that it leaves alone.

    Left alone are vectors and scalars (biases, norms, the temperature) and what ``model.no_weight_decay()`` names
    (bias tables, positional and token embeddings).

    Args:
        model: any module; ``no_weight_decay`` is optional.

    Returns:
        Two dicts from name to parameter, each in the model's order: decayed, not decayed.

    Raises:
        ValueError: ``no_weight_decay`` names a parameter that the model does not have.
    """
    no_weight_decay = cast("Callable[[], Iterable[str]] | None", getattr(model, "no_weight_decay", None))
    exempt = set() if no_weight_decay is None else set(no_weight_decay())
    parameters = dict(model.named_parameters())
    if missing := sorted(exempt - parameters.keys()):
        raise ValueError(f"no_weight_decay() names parameters that the model does not have: {', '.join(missing)}")
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    decayed = {name: p for name, p in trainable.items() if p.ndim >= 2 and name not in exempt}
    return decayed, {name: p for name, p in trainable.items() if name not in decayed}


def parameter_groups(model: nn.Module, lr_factors: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Group the trainable parameters of ``model`` by decay and by the factor of their learning rate.

    Args:
        model: as `split_by_decay` takes it.
        lr_factors: what the learning rate of a parameter is multiplied with, by name; 1 for every other.

    Returns:
        Groups with "names", "decay" and, where it is not 1, "lr_factor"; none is empty.

    >>> parameter_groups(model, layer_decay(model.layer_numbers(), 0.75))
    """
    factors = lr_factors or {}
    groups: dict[tuple[bool, float], list[str]] = {}
    for decay, members in zip((True, False), split_by_decay(model), strict=True):
        for name in members:
            groups.setdefault((decay, factors.get(name, 1.0)), []).append(name)
    return [
        {"names": names, "decay": decay, **({} if factor == 1 else {"lr_factor": factor})}
        for (decay, factor), names in groups.items()
    ]


def layer_decay(layer_numbers: Mapping[str, int], decay: float) -> dict[str, float]:
    """Return learning-rate factors that fall with depth: decay^(last - l) for a parameter of layer l (BEiT, Swin).

    Args:
        layer_numbers: parameter name -> its layer, counted from the input; the head belongs to the last one.
        decay: between 0 and 1; 1 gives every layer the same rate.
    """
    last = max(layer_numbers.values())
    return {name: decay ** (last - number) for name, number in layer_numbers.items()}


def create_optimizer(
    groups: Sequence[Mapping[str, Any]], config: RunConfig, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    """Create AdamW over groups of parameters, in one fused update a step.

    Decay is decoupled (Loshchilov and Hutter): p <- p - lr * weight_decay * p beside the adaptive step.

    Args:
        groups: what `parameter_groups` returns.
        config: lr, weight_decay, beta1, beta2 and eps are read.
        parameters: what is updated, by name: the model's own, or fp32 copies in the place of 16-bit ones.

    Returns:
        The optimiser; each of its groups keeps its ``names``, and its ``lr_factor`` if it has one.
    """
    made = [
        {
            "params": [parameters[name] for name in group["names"]],
            "weight_decay": config.weight_decay if group["decay"] else 0.0,
            **{key: value for key, value in group.items() if key != "decay"},
        }
        for group in groups
    ]
    return torch.optim.AdamW(made, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> list[str]:
    """Move the state of every parameter that kept its name and shape from ``old`` into ``new``.

    A stage that changes the window gives the bias tables another shape: these start with a fresh state, all others
    go on.

    Returns:
        Names of the parameters that start afresh.
    """
    known = {
        name: old.state[parameter]
        for group in old.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in old.state
    }
    fresh = []
    for group in new.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in known and known[name]["exp_avg"].shape == parameter.shape:
                new.state[parameter] = known[name]
            else:
                fresh.append(name)
    return fresh


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of step ``step``: linear warm-up, then the schedule that ``lr_scheduler`` names.

    With peak p, w warm-up steps, T steps in all and c steps of cool-down:
    lr(t) = p (t + 1) / w for t < w; afterwards
    cosine: min_lr + (p - min_lr) (1 + cos(pi (t - w) / (T - w))) / 2;
    constant: p;
    wsd: p until T - c, then min_lr + (p - min_lr) (T - t) / c.
    A stage with its own ``peak_lr`` has that as p.

    Args:
        config: lr, min_lr, lr_scheduler, warmup, cooldown and the stages are read.
        step: from 0.

    >>> config = RunConfig(stages=(Stage(steps=10, image_size=32),), lr=1.0, warmup=2)
    >>> [learning_rate(config, step) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    peak = config.stage_at(step)[1].peak_lr or config.lr
    warmup, total = config.warmup_steps, config.total_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_scheduler == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler in ("wsd", "const-cooldown") and step > total - config.cooldown_steps:
        return config.min_lr + (peak - config.min_lr) * (total - step) / config.cooldown_steps
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group of ``optimizer`` the learning rate ``value``, times its ``lr_factor`` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_factor", 1.0)
