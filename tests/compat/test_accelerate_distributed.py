"""Accelerated models under DistributedDataParallel and FSDP2 in two processes: on our ops, with the same training."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate
from tests.compat.hugging_face_models import RAGGED, blocks, build, error
from tests.train.processes import Processes

pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

PROCESSES, STEPS = 2, 3
OPS = ("window_attention", "layer_norm", "mlp", "patch_merging")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()


def data_parallel(model, group, static_graph=False):
    return DistributedDataParallel(model, process_group=group, static_graph=static_graph)


def sharded(model, group, parts=blocks):
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in parts(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def linears(model):
    return [module for block in blocks(model) for module in block.modules() if type(module) is torch.nn.Linear]


def counting(seen):
    """Count the calls of our ops in this process; returns what ends it."""
    originals = {name: getattr(ops, name) for name in OPS}

    def op_of(name):
        def op(*args, **kwargs):
            seen[name] += 1
            return originals[name](*args, **kwargs)

        return op

    for name in OPS:
        setattr(ops, name, op_of(name))
    return lambda: [setattr(ops, name, original) for name, original in originals.items()]


def train(model):
    """Take a few steps on this rank's images; return losses, the first gradients, whole, and the last weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    losses, first = [], {}
    for step in range(STEPS):
        loss = model(image).last_hidden_state.sin().mean()
        loss.backward()
        if not step:
            first = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, {name: whole(p.detach()) for name, p in model.named_parameters()}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


WRAPS = {
    "ddp": data_parallel,
    "ddp-checkpointed": lambda model, group: data_parallel(checkpointed(model), group, static_graph=True),
    "fsdp2": sharded,
    "fsdp2-checkpointed": lambda model, group: sharded(checkpointed(model), group),
    "fsdp2-of-each-linear": lambda model, group: sharded(model, group, linears),
}


def both(group, wrap):
    """Train the same model their way and ours; return both and how often our ops ran in ours."""
    warnings.simplefilter("ignore")  # FSDP2 on a CPU says that it is experimental
    model, seen = build().double().train(), Counter()
    model.pooler = None  # its output would have no part in the loss
    expected = train(WRAPS[wrap](copy.deepcopy(model), group))
    accelerate(model, verbose=False)
    stop = counting(seen)
    try:
        found = train(WRAPS[wrap](model, group))
    finally:
        stop()
    return expected, found, dict(seen)


ONCE = {"window_attention": 4, "layer_norm": 8, "mlp": 4, "patch_merging": 1}
"""What one forward of the model calls."""


@pytest.mark.parametrize("wrap", WRAPS)
def test_trains_as_without_us(wrap, processes):
    for (losses, grads, weights), found, seen in processes.run(both, PROCESSES, wrap):
        torch.testing.assert_close(found[0], losses, rtol=1e-10, atol=0)
        assert losses[-1] != losses[0], "the weights move"
        for ours, theirs in ((found[1], grads), (found[2], weights)):
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                if not name.endswith(("k_proj.bias", "key.bias")):  # a gradient of zero but for rounding
                    assert error(ours[name], tensor) <= 1e-10, name
        if wrap.endswith("linear"):
            # a linear with hooks of its own is called, in a forward that is theirs; the merge is wrapped with the model
            assert seen == {"patch_merging": STEPS}
        elif wrap.endswith("checkpointed"):
            assert all(seen[name] > STEPS * count for name, count in ONCE.items()), "computed again in the backward"
        else:
            assert seen == {name: STEPS * count for name, count in ONCE.items()}


def refused(group):
    warnings.simplefilter("ignore")
    model = sharded(build(), group)
    try:
        accelerate(model, verbose=False)
    except ValueError as error:
        return str(error)
    return "accelerated"


def test_what_is_sharded_already_is_refused_with_the_order_that_works(processes):
    for message in processes.run(refused, PROCESSES):
        assert "4 x the weights of q, k and v must be plain parameters, got DTensor" in message
        assert "accelerate the model before fully_shard" in message
