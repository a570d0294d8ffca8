"""The linear layer on its faster product against ``torch.nn.functional.linear``: values, gradients, and every way in
which one may stand for the other.

Letters: K channels in · N channels out · R rows.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from florence_fast import ops
from florence_fast.ops import _product

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Relative errors below these are rounding in whatever order, and are not compared."""
SHAPES = {
    "one-row-no-batch": (8,),
    "rows": (7, 24),
    "text": (2, 5, 96),
    "map": (2, 3, 4, 37),
    "one-channel": (3, 1),
    "many-rows": (300, 33),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(scope="module", params=["plain", "onednn"], autouse=True)
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each library of float32 products in force, whichever is the faster one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_product, "library", lambda dtype: request.param if dtype == torch.float32 else "onednn")
        yield request.param


def make(shape: tuple[int, ...], dtype: torch.dtype, out: int = 19, bias: bool = True) -> dict[str, Tensor | None]:
    """Draw the tensors, which ask for gradients."""
    sizes = {"x": shape, "weight": (out, shape[-1]), "bias": (out,)}
    tensors = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    return tensors if bias else tensors | {"bias": None}


def run(function: Any, tensors: dict[str, Tensor | None], grad_out: Tensor) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(tensors["x"], tensors["weight"], tensors["bias"])
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def grad_for(tensors: dict[str, Tensor | None]) -> Tensor:
    x, weight = tensors["x"], tensors["weight"]
    return torch.randn(*x.shape[:-1], len(weight), device=x.device).to(x.dtype)


def check(tensors: dict[str, Tensor | None], grad_out: Tensor) -> None:
    """Hold our error against that of ``F.linear`` in the same dtype: twice as much in values, thrice in gradients."""
    dtype = tensors["x"].dtype
    wide = {n: x if x is None else x.detach().double().requires_grad_(x.requires_grad) for n, x in tensors.items()}
    exact = run(F.linear, wide, grad_out.double())
    ours, usual = run(ops.linear, tensors, grad_out), run(F.linear, tensors, grad_out)
    assert set(ours) == set(usual)
    for name, x in exact.items():
        assert ours[name].dtype == dtype and ours[name].shape == x.shape, name
        error, plain = ((y[name].double() - x).norm().item() for y in (ours, usual))
        allowed = max((2 if name == "out" else 3) * plain, FLOOR.get(dtype, 0) * x.norm().item())
        assert error <= allowed, f"linear, {name}, {dtype}, {tuple(x.shape)}: {error:.2e}, allowed is {allowed:.2e}"
    inference = {n: x if x is None else x.detach() for n, x in tensors.items()}
    assert torch.equal(ops.linear(**inference), ours["out"])


@DTYPES
@shapes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_the_library(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, poisoned_memory: None) -> None:
    tensors = make(shape, dtype, bias=bias)
    check(tensors, grad_for(tensors))


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    out=st.integers(1, 60),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(shape: list[int], out: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(out)
    tensors = make(tuple(shape), dtype, out, bias)
    check(tensors, grad_for(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_the_inputs_are_left_alone(dtype: torch.dtype) -> None:
    tensors = make((3, 5, 24), dtype)
    leaves = {n: x.detach() for n, x in tensors.items()}
    turned = {n: x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x] * 2, 1)[:, 0] for n, x in leaves.items()}
    shifted = {n: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for n, x in leaves.items()}
    strided = {n: torch.stack([x] * 2, -1).flatten(-2)[..., ::2] for n, x in leaves.items()}
    expanded = leaves | {"x": leaves["x"][:1, :1].expand(3, 5, 24)}
    for others in (turned, shifted, strided, expanded):
        others = {n: x.requires_grad_() for n, x in others.items()}
        check(others, grad_for(others))
        check(others, grad_for(others).mT.contiguous().mT)
    check(tensors, torch.ones((), dtype=dtype).expand(3, 5, 19))
    for others in (turned, shifted, strided):
        assert all(torch.equal(x, leaves[n]) for n, x in others.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = make(shape, dtype)
    got, usual = (run(f, tensors, grad_for(tensors)) for f in (ops.linear, F.linear))
    for name, x in usual.items():
        assert got[name].shape == x.shape and torch.equal(got[name], x), name


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_no_channels(bias: bool) -> None:
    tensors = make((3, 0), torch.float32, bias=bias)
    got, usual = (run(f, tensors, torch.ones(3, 19)) for f in (ops.linear, F.linear))
    assert all(torch.equal(got[name], x) for name, x in usual.items())


def test_every_subset_of_gradients() -> None:
    tensors = make((3, 5, 24), torch.float32)
    grad_out = grad_for(tensors)
    everything = run(ops.linear, tensors, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(ops.linear, some, grad_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"
    with torch.no_grad():
        assert not ops.linear(**tensors).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_it_does_for_the_library(dtype: torch.dtype, cast: torch.dtype) -> None:
    tensors = make((2, 5, 24), dtype)
    with torch.autocast("cpu", cast):
        ours, usual = (f(tensors["x"], tensors["weight"], tensors["bias"]) for f in (ops.linear, F.linear))
    assert ours.dtype == usual.dtype
    torch.testing.assert_close(ours, usual, rtol=0.02, atol=0.05)
    grads = [torch.autograd.grad(y.float().square().sum(), list(tensors.values())) for y in (ours, usual)]
    for got, wanted in zip(*grads, strict=True):
        assert got.dtype == wanted.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.5)


def test_a_backward_within_autocast() -> None:
    tensors = make((2, 5, 24), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.linear(**tensors)
        within = torch.autograd.grad(out.sum(), list(tensors.values()), retain_graph=True)
    assert all(map(torch.equal, within, torch.autograd.grad(out.sum(), list(tensors.values()))))


def test_compiled_it_is_the_library() -> None:
    """A compiler fuses what it can see: no graph break, and no call of ours."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    tensors = make((2, 5, 24), torch.float32)
    compiled = torch.compile(ops.linear, fullgraph=True, backend=keep)
    grad_out = grad_for(tensors)
    got, usual = run(compiled, tensors, grad_out), run(F.linear, tensors, grad_out)
    assert all(torch.equal(got[name], x) for name, x in usual.items())
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [F.linear]


def test_exported_it_is_the_library() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(24, 19)

        def forward(self, x: Tensor) -> Tensor:
            return ops.linear(x, self.fc.weight, self.fc.bias)

    module, x = Module(), torch.randn(2, 5, 24)
    program = torch.export.export(module, (x,))
    assert "mkldnn" not in str(program.graph) and "autograd" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))


def test_meta_device() -> None:
    tensors = {n: x.detach().to("meta").requires_grad_() for n, x in make((2, 5, 24), torch.float32).items()}
    got = run(ops.linear, tensors, grad_for(tensors))
    assert got["out"].shape == (2, 5, 19) and all(got[f"d{n}"].shape == x.shape for n, x in tensors.items())


@pytest.mark.parametrize("known", [True, False], ids=["after-a-product", "first-of-all"])
def test_fake_tensors(known: bool) -> None:
    """Shapes without memory, as tools that plan memory use them outside torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = make((2, 5, 24), torch.float32)
    if not known:
        _product._has_onednn.cache_clear()
    ops.linear(**tensors) if known else None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(x) for n, x in tensors.items()}
        assert ops.linear(**fake).shape == (2, 5, 19)
    check(tensors, grad_for(tensors))


def test_without_the_faster_product_it_is_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_product, "_has_onednn", lambda _: False)
    tensors = make((2, 5, 24), torch.float32)
    grad_out = grad_for(tensors)
    got, usual = run(ops.linear, tensors, grad_out), run(F.linear, tensors, grad_out)
    assert torch.equal(got["out"], usual["out"])
    for name, x in usual.items():
        torch.testing.assert_close(got[name], x, msg=lambda text, name=name: f"{name}: {text}")


def test_second_derivatives_are_those_of_the_library() -> None:
    tensors = make((3, 24), torch.float32)

    def penalty(linear: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (grad,) = torch.autograd.grad(linear(**tensors).square().sum(), tensors["x"], create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), list(tensors.values()))

    torch.testing.assert_close(penalty(ops.linear), penalty(F.linear), rtol=1e-3, atol=1e-3)


def test_activation_checkpointing_and_deep_copies() -> None:
    tensors = list(make((3, 24), torch.float32).values())
    outs = ops.linear(*tensors), checkpoint(ops.linear, *tensors, use_reentrant=False)
    assert all(map(torch.equal, *(torch.autograd.grad(y.square().sum(), tensors) for y in outs)))
    assert torch.equal(ops.linear(*copy.deepcopy([x.detach() for x in tensors])), outs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row_and_is_not_lost(dtype: torch.dtype) -> None:
    tensors = make((3, 24), dtype)
    with torch.no_grad():
        tensors["x"][1, 2], tensors["x"][2, 3] = math.nan, math.inf
    out = ops.linear(**tensors)
    assert out.isnan().all(1).tolist() == [False, True, False] and out[2].isinf().all()
    assert run(ops.linear, tensors, grad_for(tensors))["dweight"][:, 2].isnan().all()


def test_products_are_counted_as_the_library_counts_its_own() -> None:
    tensors, counted = make((2, 5, 24), torch.float32), []
    for function in (ops.linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            run(function, tensors, torch.ones(2, 5, 19))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * 10 * 24 * 19


WRONG = {
    "inner sizes": ((3, 24), (19, 23), (19,)),
    "bias of another width": ((3, 24), (19, 24), (18,)),
    "weight in 3-D": ((3, 24), (2, 19, 24), (19,)),
    "x of rank 0": ((), (19, 24), (19,)),
    "weight in 3-D, no bias": ((3, 24), (2, 19, 24), None),
}


@pytest.mark.parametrize("shapes", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_what_does_not_fit_is_refused(shapes: tuple, dtype: torch.dtype, train: bool) -> None:
    x, weight, bias = (None if s is None else torch.randn(s).to(dtype).requires_grad_(train) for s in shapes)
    with pytest.raises(RuntimeError):
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError):
        ops.linear(x, weight, bias)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_must_agree(weight: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=re.compile("dtype", re.IGNORECASE)):
        ops.linear(torch.randn(3, 24), torch.randn(19, 24).to(weight))


@pytest.mark.parametrize("bias", [(1,), (1, 19), (3, 19), ()], ids=str)
def test_a_bias_that_the_library_broadcasts(bias: tuple[int, ...]) -> None:
    tensors = make((3, 24), torch.float32) | {"bias": torch.randn(bias, requires_grad=True)}
    try:
        usual = run(F.linear, tensors, torch.ones(3, 19))
    except RuntimeError:
        with pytest.raises(RuntimeError):
            run(ops.linear, tensors, torch.ones(3, 19))
        return
    got = run(ops.linear, tensors, torch.ones(3, 19))
    for name, x in usual.items():
        torch.testing.assert_close(got[name], x, msg=lambda text, name=name: f"{name}: {text}")


def test_a_weight_of_one_row_without_its_axis() -> None:
    tensors = {"x": torch.randn(3, 24, requires_grad=True), "weight": torch.randn(24, requires_grad=True), "bias": None}
    got, usual = (run(f, tensors, torch.ones(3)) for f in (ops.linear, F.linear))
    for name, x in usual.items():
        torch.testing.assert_close(got[name], x)
