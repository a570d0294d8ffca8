"""What ranks, and a run and its checkpoint, must have in common besides the config: the model and the data."""

import hashlib
from typing import Any

import numpy as np
from torch import nn

SAMPLES = 64


def model_name(model: nn.Module) -> str:
    """Name a model by its class and size."""
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters"


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Say what two ranks' models must agree on: sizes, and the tensors by name, shape and type, not their values."""
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    return {"config": model.config.to_dict(), "tensors": hashlib.sha256(repr(tensors).encode()).hexdigest()[:12]}


def describe_data(source: Any) -> dict[str, Any]:
    """Say what the data of two ranks, or of a run and its checkpoint, must agree on: their number, and some texts."""
    indices = np.linspace(0, len(source) - 1, min(len(source), SAMPLES)).astype(int)
    digest = hashlib.sha256()
    for index in indices.tolist():
        try:
            digest.update(repr(source.texts(index)).encode("utf-8", "backslashreplace"))
        except (OSError, ValueError):
            digest.update(b"unreadable")
    return {"pairs": len(source), "digest": digest.hexdigest()[:12]}
