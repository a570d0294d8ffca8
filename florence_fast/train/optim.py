"""AdamW with decoupled decay, the groups that it does not decay, and the learning rate of every step."""

import math

import torch
from torch import nn

from florence_fast.train.config import TrainConfig
from florence_fast.train.masters import MasterWeights


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
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    parameters = dict(model.named_parameters())
    if missing := sorted(exempt - parameters.keys()):
        raise ValueError(f"no_weight_decay() names parameters that the model does not have: {', '.join(missing)}")
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    decayed = {name: p for name, p in trainable.items() if p.ndim >= 2 and name not in exempt}
    return decayed, {name: p for name, p in trainable.items() if name not in decayed}


def create_optimizer(model: nn.Module, config: TrainConfig, masters: MasterWeights | None = None) -> torch.optim.AdamW:
    """Create AdamW over the model's trainable parameters, in one fused update a step.

    Decay is decoupled (Loshchilov and Hutter): p <- p - lr * weight_decay * p beside the adaptive step.

    Args:
        model: module whose parameters are already on their device.
        config: lr, weight_decay, beta1, beta2 and eps are read.
        masters: fp32 copies that are updated in the place of 16-bit parameters.

    Returns:
        The optimiser, with one group that decays and one that does not; each group lists its ``names``.
    """
    decayed, kept = split_by_decay(model)
    updated = {**decayed, **kept} if masters is None else masters.named
    groups = [
        {"params": [updated[name] for name in members], "names": list(members), "weight_decay": decay}
        for members, decay in ((decayed, config.weight_decay), (kept, 0.0))
        if members
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of step ``step``: linear warm-up, then one cosine over the whole run.

    With peak p, w warm-up steps and T steps in all:
    lr(t) = p (t + 1) / w for t < w, else min_lr + (p - min_lr) (1 + cos(pi (t - w) / (T - w))) / 2.
    A stage with its own ``peak_lr`` has that as p.

    Args:
        config: lr, min_lr, warmup and the stages are read.
        step: from 0.

    >>> config = TrainConfig(stages=(Stage(steps=10, image_size=32),), lr=1.0, warmup=2)
    >>> [learning_rate(config, step) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    peak = config.stage_at(step)[1].peak_lr or config.lr
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.total_steps - warmup)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group of ``optimizer`` the learning rate ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = value
