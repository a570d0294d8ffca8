"""A task's model as the processes of a run train it."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from florence_fast.train.distributed import world_size


def wrap(model: nn.Module) -> nn.Module:
    """Return ``model``, wrapped in DistributedDataParallel when several processes train.

    Gradient buckets have the dtypes of the parameters, so weights must have been cast before.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
