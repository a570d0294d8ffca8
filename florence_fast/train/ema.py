"""A moving average of the weights, kept in fp32 beside the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class EMA:
    """The exponential moving average of a model's weights.

    After the k-th update, average <- d average + (1 - d) weights with d = min(decay, (1 + k) / (10 + k)), so that the
    random start is forgotten within a few steps.

    Args:
        model: the module to follow; its parameters are copied in fp32, on their device.
        decay: weight of the past, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, masters: Mapping[str, torch.Tensor] | None = None) -> None:
        """Move the average towards the weights, or towards the fp32 ``masters`` of those that have one."""
        self.updates += 1
        exact = {**dict(model.named_parameters()), **(masters or {})}
        weights = {name: p.detach().float() for name, p in exact.items()}
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        followed = [self.average[name] for name in weights]
        torch._foreach_lerp_(followed, list(weights.values()), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def restart_resized(self, model: nn.Module) -> None:
        """Let the average of every parameter that has changed its shape start again from where it is now."""
        for name, parameter in model.named_parameters():
            if self.average[name].shape != parameter.shape:
                self.average[name] = parameter.detach().float().clone()

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Let ``model`` hold the average inside the ``with`` block, and its own weights again afterwards."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        _copy_into(model, self.average)
        try:
            yield
        finally:
            _copy_into(model, own)

    def state_dict(self) -> dict[str, object]:
        """Return the average and the number of updates."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: the names are not those of the followed model.
        """
        if differing := sorted(set(state["average"]) ^ set(self.average)):
            raise ValueError(
                f"the moving average belongs to another model; differing names: {', '.join(differing[:3])}"
            )
        for name, value in state["average"].items():
            self.average[name] = value.to(self.average[name].device, copy=True)
        self.updates = state["updates"]


@torch.no_grad()
def _copy_into(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Overwrite the parameters of ``model`` with ``values``, cast to their dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
