"""What mlp computes and promises: the definition against modules of torch.nn in float64 and by finite differences, the
``torch`` backend against the definition, and torch.library's contract, compile, export and autocast.

Letters: C channels in · F hidden width · E channels out · R rows.
"""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from florence_fast import ops

FORWARD = torch.ops.florence_fast.mlp.default
BACKWARD = torch.ops.florence_fast.mlp_backward.default

NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
SHAPES = {"map": (2, 3, 4, 6), "text": (3, 5, 8), "rows": (7, 5), "one-channel": (4, 1), "one-row-no-batch": (9,)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
backends = pytest.mark.parametrize("backend", ["torch", "reference"])


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, biases: bool = True, **kwargs: Any) -> dict:
    """Draw the tensors, which ask for gradients: a hidden width of 11, and 3 channels out."""
    sizes = {"x": shape, "weight1": (11, shape[-1]), "bias1": (11,), "weight2": (3, 11), "bias2": (3,)}
    tensors = {name: torch.randn(size, **kwargs).to(dtype) for name, size in sizes.items()}
    if not biases:
        tensors |= {"bias1": None, "bias2": None}
    return {name: x if x is None else x.requires_grad_() for name, x in tensors.items()}


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def by_modules(x, weight1, bias1, weight2, bias2, activation="gelu") -> Tensor:
    """Apply modules, as one would write it in PyTorch."""
    middle = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "quick_gelu": QuickGELU()}[activation]
    linear1 = nn.Linear(*weight1.shape[::-1], bias=bias1 is not None)
    linear2 = nn.Linear(*weight2.shape[::-1], bias=bias2 is not None)
    y = middle(torch.func.functional_call(linear1, _named(weight1, bias1), x))
    return torch.func.functional_call(linear2, _named(weight2, bias2), y)


def _named(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def run(function: Any, tensors: dict, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(**tensors, **options)
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def grad_for(tensors: dict) -> Tensor:
    return torch.randn_like(by_modules(**{n: None if x is None else x.detach() for n, x in tensors.items()}))


@backends
@activations
@shapes
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_equals_modules_in_float64(shape, activation: str, biases: bool, backend: str, poisoned_memory: None) -> None:
    tensors = make(shape, biases=biases)
    grad_out = grad_for(tensors)
    with ops.backend(backend):
        got = run(ops.mlp, tensors, grad_out, activation=activation)
    for name, x in run(by_modules, tensors, grad_out, activation=activation).items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@activations
def test_reference_by_finite_differences(activation: str) -> None:
    tensors = make((2, 3, 4))
    assert torch.autograd.gradcheck(lambda *xs: ops.mlp_reference(*xs, activation=activation), list(tensors.values()))


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_torch_backend_is_as_exact_as_plain_pytorch(dtype: torch.dtype, activation: str) -> None:
    tensors = make((64, 20), dtype)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    grad_out = grad_for(tensors)
    ours, usual = (run(f, tensors, grad_out, activation=activation) for f in (ops.mlp, by_modules))
    exact = run(ops.mlp_reference, exact_tensors, grad_out.double(), activation=activation)
    for name, x in exact.items():
        error, plain = (((y[name].double() - x).norm() / x.norm()).item() for y in (ours, usual))
        assert ours[name].dtype == dtype
        assert error <= max((2 if name == "out" else 3) * plain, 1e-6), (name, error, plain)


def test_every_subset_of_gradients() -> None:
    tensors = make((3, 4, 6))
    grad_out = grad_for(tensors)
    everything = run(ops.mlp, tensors, grad_out)
    for count in range(1, len(NAMES)):
        for subset in itertools.combinations(NAMES, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(ops.mlp, some, grad_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


def test_the_wide_tensor_is_kept_once() -> None:
    tensors = make((5, 7, 6))

    def wide(out: Tensor) -> int:
        seen, found, todo = set(), set(), [out.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            saved += list(getattr(node, "saved_tensors", ()))
            found |= {x.data_ptr() for x in saved if isinstance(x, Tensor) and x.numel() == 35 * 11}
            todo += [parent for parent, _ in node.next_functions]
        return len(found)

    assert wide(ops.mlp(**tensors)) == 1
    assert wide(by_modules(**tensors)) == 2
    with torch.no_grad():
        assert FORWARD(*tensors.values(), "gelu", False, "torch")[1].numel() == 0


@activations
@pytest.mark.parametrize("train", [True, False])
def test_opcheck(activation: str, train: bool) -> None:
    tensors = make((2, 3, 6), torch.float32)
    torch.library.opcheck(FORWARD, (*(x.requires_grad_(train) for x in tensors.values()), activation, train, "torch"))


@pytest.mark.parametrize("needs", [[True] * 5, [False, False, False, True, False], [True, False, False, False, False]])
def test_opcheck_backward(needs: list[bool]) -> None:
    tensors = [x.detach() for x in make((2, 3, 6), torch.float32).values()]
    out, hidden = FORWARD(*tensors, "gelu", True, "torch")
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), *tensors, hidden, needs, "gelu", True, "torch"))


def test_compiles_once_for_every_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.mlp, fullgraph=True, dynamic=True, backend=counter)
    tensors = make((2, 3, 6), torch.float32)
    for shape in ((2, 5, 6), (4, 5, 6), (7, 9, 6)):  # no size of x is one of the weights'
        tensors["x"] = torch.randn(shape, requires_grad=True)
        grad_out = grad_for(tensors)
        got, expected = run(compiled, tensors, grad_out), run(ops.mlp, tensors, grad_out)
        assert all(torch.equal(x, got[name]) for name, x in expected.items()), shape
        assert counter.frame_count == 1, f"compiled again for {shape}"


def test_inductor() -> None:
    tensors = make((2, 3, 6), torch.float32)
    grad_out = grad_for(tensors)
    got = run(torch.compile(ops.mlp, fullgraph=True), tensors, grad_out)
    torch.testing.assert_close(got, run(ops.mlp, tensors, grad_out))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def test_export_with_dynamic_sizes() -> None:
    module, dims = Mlp(), ({0: Dim("batch", min=2), 1: Dim("tokens", min=2)},)
    exported = torch.export.export(module, (torch.randn(2, 3, 6),), dynamic_shapes=dims).module()
    x = torch.randn(5, 4, 6)
    assert torch.equal(exported(x), module(x))


def test_meta_device() -> None:
    tensors = make((2, 3, 6), torch.float32, device="meta")
    got = run(ops.mlp, tensors, torch.empty(2, 3, 3, device="meta"))
    assert got["out"].shape == (2, 3, 3)
    assert all(got[f"d{name}"].shape == x.shape for name, x in tensors.items())


@backends
def test_autocast_casts_as_it_does_for_linear_layers(backend: str) -> None:
    tensors = make((2, 3, 6), torch.float32)
    with ops.backend(backend):
        low = {name: x.bfloat16() for name, x in tensors.items()}
        expected = ops.mlp(**low)
        with torch.autocast("cpu", torch.bfloat16):
            out, usual = ops.mlp(**tensors), by_modules(**tensors)
    assert out.dtype == usual.dtype == torch.bfloat16 and torch.equal(out, expected)
    torch.testing.assert_close(out, usual, rtol=0.05, atol=0.05)
    # A backward inside autocast is the torch backend's promise; the reference is differentiated by autograd.
    with torch.autocast("cpu", torch.bfloat16, enabled=backend == "torch"):
        grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
    wanted = torch.autograd.grad(expected.float().square().sum(), list(tensors.values()))
    assert all(grad.dtype == torch.float32 for grad in grads) and all(map(torch.equal, grads, wanted))


def test_autocast_leaves_float64_alone() -> None:
    tensors = make((2, 3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.mlp(**tensors)
    assert torch.equal(out, ops.mlp(**tensors))


def test_activation_checkpointing() -> None:
    tensors = list(make((2, 3, 6)).values())
    outs = ops.mlp(*tensors), checkpoint(ops.mlp, *tensors, use_reentrant=False)
    assert all(map(torch.equal, *(torch.autograd.grad(y.square().sum(), tensors) for y in outs)))


@backends
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    tensors = make(shape, torch.float32)
    with ops.backend(backend):
        got = run(ops.mlp, tensors, torch.randn(*shape[:-1], 3))
        with torch.no_grad():
            assert ops.mlp(**tensors).shape == got["out"].shape == (*shape[:-1], 3)
    assert got["dx"].shape == shape and not any(got[f"d{name}"].any() for name in NAMES[1:])


def test_any_strides_and_the_inputs_are_left_alone() -> None:
    tensors = make((4, 5, 6))
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for n, x in tensors.items()}
    before = {n: x.detach().clone() for n, x in turned.items()}
    grad_out = torch.randn(4, 3, 5, dtype=torch.float64).mT
    got, expected = run(ops.mlp, turned, grad_out), run(ops.mlp, tensors, grad_out.contiguous())
    assert got["out"].is_contiguous() and not turned["x"].is_contiguous()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(x, before[name]) for name, x in turned.items())


@backends
@activations
def test_nan_stays_in_its_row_and_is_not_lost(activation: str, backend: str) -> None:
    tensors = make((3, 6))
    with torch.no_grad():
        tensors["x"][1, 2] = torch.nan
    with ops.backend(backend):
        got = run(ops.mlp, tensors, torch.ones(3, 3), activation=activation)
    for name in ("out", "dx"):
        assert got[name].isnan().all(1).tolist() == [False, True, False] and not got[name][::2].isnan().any()
    assert all(got[name].isnan().any() for name in ("dweight1", "dbias1", "dweight2"))


def test_second_derivatives_are_those_of_the_reference() -> None:
    tensors = make((3, 6))

    def second_derivative() -> Tensor:
        (grad,) = torch.autograd.grad(ops.mlp(**tensors).square().sum(), tensors["x"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors["weight1"])[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


BAD = [
    ({"activation": "gelu_tanhh"}, ValueError, "unknown activation 'gelu_tanhh' (did you mean 'gelu_tanh'?)"),
    ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
    ({"x": torch.ones(2, 6).long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., C), got ()"),
    ({"weight1": torch.ones(11, 5)}, ValueError, "weight1 must have shape (F, 6), got (11, 5)"),
    ({"weight2": torch.ones(3, 12)}, ValueError, "weight2 must have shape (E, 11), got (3, 12)"),
    ({"weight2": None}, TypeError, "weight2 must be a floating-point tensor, got NoneType"),
    ({"bias1": torch.ones(6)}, ValueError, "bias1 must have shape (11,), got (6,)"),
    ({"bias2": 1.0}, TypeError, "bias2 must be a floating-point tensor, got float"),
    ({"bias2": torch.ones(3).half()}, ValueError, "bias2 must have the dtype of x, torch.float32, got torch.float16"),
    ({"bias2": torch.ones(3, device="meta")}, ValueError, "bias2 must be on the device of x, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.mlp(**{**make((2, 6), torch.float32), **change})
