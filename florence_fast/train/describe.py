"""Describe the model, which must be the same on all ranks and in a run and its checkpoint."""

import hashlib
from typing import Any

from torch import nn


def model_name(model: nn.Module) -> str:
    """Name a model by its class and size."""
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters"


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of a model that has one as ``config``, and of others nothing."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return {} if to_dict is None else to_dict()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Say what two ranks' models must agree on: sizes, and the tensors by name, shape and type, not their values."""
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    return {"config": model_config(model), "tensors": hashlib.sha256(repr(tensors).encode()).hexdigest()[:12]}
