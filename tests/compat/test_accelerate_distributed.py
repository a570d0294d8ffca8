"""Accelerated models under DistributedDataParallel and FSDP2: still on our ops, with the same gradients."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate
from tests.compat.hugging_face_models import RAGGED, blocks, build, error

pytest.importorskip("transformers")


@pytest.fixture
def one_rank(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def counts(monkeypatch):
    """How often each op was called."""
    seen = Counter()

    def counting(name, original):
        def op(*args, **kwargs):
            seen[name] += 1
            return original(*args, **kwargs)

        return op

    for name in ("window_attention", "layer_norm", "mlp", "patch_merging"):
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return seen


def data_parallel(model):
    # the model's last norm and pooler end in an output that this loss does not use
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model):
    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)
    return model


def gradients(model, image):
    features = model(image).last_hidden_state
    features.sin().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return features.detach(), whole


@pytest.mark.filterwarnings("ignore")  # FSDP2 on a CPU says that it is experimental
@pytest.mark.parametrize("wrap", [data_parallel, sharded], ids=["ddp", "fsdp2"])
def test_wrapped_after_accelerating(wrap, one_rank, counts):
    model = build().double().train()
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    ours = copy.deepcopy(model)
    accelerate(ours, verbose=False)
    expected, expected_grads = gradients(model, image)
    assert not counts
    found, found_grads = gradients(wrap(ours), image)
    assert counts == {"window_attention": 4, "layer_norm": 8, "mlp": 4, "patch_merging": 1}
    assert error(found, expected) <= 1e-10
    for name, grad in expected_grads.items():
        if not name.endswith(("k_proj.bias", "key.bias")):  # zero but for rounding
            assert error(found_grads[name], grad) <= 1e-10, name
