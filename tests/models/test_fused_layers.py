"""The towers compute through the fused ops, to the numbers of their modules, and call what others put or hang there."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from florence_fast.models.coswin import CoSwin
from florence_fast.models.swin import Swin
from florence_fast.models.text import TextTower
from tests.models.tiny import COSWIN, SWIN, TEXT

TOWERS = {
    "coswin": (
        lambda: CoSwin(dataclasses.replace(COSWIN, drop_path_rate=0.5)),
        {"layer_norm", "mlp", "window_attention"},
    ),
    "swin": (
        lambda: Swin(dataclasses.replace(SWIN, drop_path_rate=0.5)),
        {"layer_norm", "mlp", "patch_merging", "window_attention"},
    ),
    "text": (lambda: TextTower(dataclasses.replace(TEXT, act="gelu")), {"layer_norm", "mlp"}),
    "text-of-clip": (lambda: TextTower(dataclasses.replace(TEXT, act="quick_gelu")), {"layer_norm", "mlp"}),
}
towers = pytest.mark.parametrize("make, used", TOWERS.values(), ids=TOWERS)


class Names(TorchDispatchMode):
    """Collects the names of our ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "florence_fast":
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def inputs(tower: nn.Module) -> Tensor:
    if isinstance(tower, TextTower):
        return torch.randint(1, tower.config.vocab_size, (3, 9))
    return torch.randn(3, 3, 72, 100, dtype=torch.float64)


def module_by_module(tower: nn.Module) -> nn.Module:
    """Return a copy each of whose modules has a hook, so that nothing may be computed past it."""
    other = copy.deepcopy(tower)
    for module in other.modules():
        module.register_forward_hook(lambda module, args, out: None)
    return other


@towers
@pytest.mark.parametrize("training", [False, True])
def test_the_ops_are_used_and_compute_what_the_modules_do(make, used, training):
    tower = make().double().train(training)
    other = module_by_module(tower)
    x, results = inputs(tower), []
    for each in (tower, other):
        torch.manual_seed(3)  # of drop path
        with Names() as names:
            out = each(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out, {name: p.grad for name, p in each.named_parameters()}, names.seen))
    (out, grads, seen), (wanted, wanted_grads, left) = results
    assert seen == used and left == used & {"window_attention"}
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class Adapter(nn.Linear):
    """A linear map with something added, as low-rank adapters do it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["mlp.fc1", "mlp.fc2"])
def test_an_adapter_in_the_place_of_a_linear_is_called(name):
    tower = CoSwin(COSWIN).eval()
    x = torch.randn(1, 3, 64, 64)
    before = tower(x)
    block = tower.layers[0].blocks[0]
    linear = block.get_submodule(name)
    adapter = Adapter(linear.in_features, linear.out_features)
    adapter.load_state_dict(linear.state_dict())
    parent, child = name.split(".")
    setattr(block.get_submodule(parent), child, adapter)
    assert not torch.allclose(tower(x), before, rtol=1e-3)


def test_a_hook_on_a_norm_is_called():
    tower, seen = CoSwin(COSWIN).eval(), []
    tower.layers[0].blocks[0].norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    tower(torch.randn(1, 3, 64, 64))
    assert len(seen) == 1


def test_whatever_hangs_on_a_module_is_called():
    seen = []
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        tower = CoSwin(COSWIN)
        getattr(tower.layers[0].blocks[0].mlp.fc1, register)(lambda *args: seen.append(1))
        tower(torch.randn(1, 3, 64, 64)).sum().backward()
    tower = CoSwin(COSWIN)
    linear = tower.layers[0].blocks[0].mlp.fc2
    linear.forward = lambda x: seen.append(1) or nn.Linear.forward(linear, x)  # as offloading does it
    tower(torch.randn(1, 3, 64, 64))
    assert len(seen) == 3


class Twice(nn.Module):
    """Something around a part of a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def test_the_text_towers_mlp_may_be_wrapped_hooked_and_extended():
    tokens = torch.randint(1, TEXT.vocab_size, (3, 9))
    plain = TextTower(TEXT)
    before, seen = plain(tokens), []

    def changed(change: Callable[[nn.Sequential], nn.Module | None]) -> Tensor:
        tower = copy.deepcopy(plain)
        mlp = change(tower.resblocks[0].mlp)
        if mlp is not None:
            tower.resblocks[0].mlp = mlp
        return tower(tokens)

    hooked = changed(lambda mlp: mlp.register_forward_hook(lambda *args: seen.append(1)) and None)
    torch.testing.assert_close(hooked, before)
    changed(lambda mlp: mlp.gelu.register_forward_hook(lambda *args: seen.append(1)) and None)
    assert len(seen) == 2
    assert not torch.allclose(changed(Twice), before)
    assert not torch.allclose(changed(lambda mlp: mlp.add_module("more", Twice(nn.Identity()))), before)
    assert not torch.equal(changed(lambda mlp: setattr(mlp, "gelu", nn.GELU("tanh"))), before)


def test_flops_of_fused_products_are_counted():
    for tower, x in ((Swin(SWIN), torch.randn(1, 3, 64, 64)), (TextTower(TEXT), torch.ones(2, 9, dtype=torch.long))):
        counts = []
        for each in (tower, module_by_module(tower)):
            with FlopCounterMode(display=False) as counter:
                each(x).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
