"""Wrap a task's model for compilation and for several processes."""

from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from florence_fast.train.distributed import world_size


def wrap(model: nn.Module, compiled: bool = False) -> nn.Module:
    """Return ``model``, compiled if wanted, and in DistributedDataParallel when several processes train.

    Gradient buckets have the dtypes of the parameters, so weights must have been cast before. The result shares the
    parameters of ``model``, whose names stay what they were.
    """
    module = cast(nn.Module, torch.compile(model)) if compiled else model
    if world_size() == 1:
        return module
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
