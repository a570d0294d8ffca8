"""16-bit products on a processor without units for them: in float32, as exact as the plain ones, and seen as products.

Each test pretends that the processor has no such units, so that the path is the same on every machine.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import florence_fast as ff
from florence_fast import native, ops
from florence_fast.ops import _product
from florence_fast.ops.linear import convolution, product

DTYPES = (torch.bfloat16, torch.float16)
BACKENDS = ("torch", *(("cpp",) if native.levels() else ()))
Function = Callable[..., Tensor]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolution(F.conv2d, x, weight, bias, 2, 1)


def _window_attention(qkv: Tensor, table: Tensor) -> Tensor:
    return ops.window_attention(qkv, table, window_size=4, num_heads=2, shift_size=2)


# name -> function, shapes of its tensors, the backends that it has
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...], tuple[str, ...]]] = {
    "linear": (ops.linear, ((3, 70, 24), (40, 24), (40,)), ("torch",)),
    "product": (product, ((6, 9, 8), (6, 8, 11), (9, 11)), ("torch",)),
    "convolution": (_convolve, ((2, 3, 9, 8), (6, 3, 3, 3), (6,)), ("torch",)),
    "mlp": (ops.mlp, ((2, 70, 24), (48, 24), (48,), (20, 48), (20,)), BACKENDS),
    "patch_merging": (ops.patch_merging, ((2, 7, 6, 16), (64,), (64,), (32, 64)), BACKENDS),
    "window_attention": (_window_attention, ((2, 7, 8, 48), (49, 2)), ("torch",)),
    "window_attention_partitioned": (ops.window_attention_partitioned, (*[(4, 2, 9, 8)] * 3, (2, 9, 9)), ("torch",)),
    "conv_embed": (
        lambda *tensors: ops.conv_embed(*tensors, stride=2, padding=1),
        ((2, 8, 7, 6), (10, 6, 3, 3), (10,), (10,), (10,)),
        ("torch",),
    ),
}
ROWS = [(name, backend) for name, (_, _, backends) in CASES.items() for backend in backends]


@pytest.fixture(autouse=True)
def lacks_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let the processor be one without 16-bit units; chunks are short, so that there are several."""

    def pretend(lacks: bool) -> None:
        monkeypatch.setattr(_product, "_lacks_units", lambda format: lacks)

    monkeypatch.setattr(_product, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(_product, "_LONG_CHUNK_BYTES", 1)
    pretend(True)
    return pretend


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = CASES[name][1]
    return [(torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).to(dtype) for shape in shapes]


def _with_gradients(function: Function, inputs: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with ff.backend(backend):
        out = function(*leaves)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), ROWS)
def test_values_and_gradients_are_as_exact_as_those_of_the_plain_product(
    name: str, backend: str, dtype: torch.dtype, lacks_units: Callable[[bool], None]
) -> None:
    function, inputs = CASES[name][0], _inputs(name, dtype)
    exact = _with_gradients(function, [x.double() for x in inputs], "reference")
    found = _with_gradients(function, inputs, backend)
    lacks_units(False)
    plain = _with_gradients(function, inputs, backend)
    for place, (ours, theirs, true) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        error, bound = (ours.double() - true).norm(), 2 * (theirs.double() - true).norm()
        assert error <= bound, f"tensor {place}: {error} against twice {bound / 2}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_product_runs_in_16_bits(dtype: torch.dtype) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name()
            low = any(isinstance(a, Tensor) and a.dtype in DTYPES for a in args)
            if low and any(word in name for word in ("mm", "conv", "_linear_pointwise", "attention_for_cpu")):
                seen.append(name)
            return func(*args, **(kwargs or {}))

    # Our ops run below the mode, so their insides are watched as functions.
    mlp, patch_merging = importlib.import_module("florence_fast.ops.mlp.op"), ops.OPS["patch_merging"]
    x, *others = _inputs("mlp", dtype)
    with Watch():
        out, hidden = mlp._forward(x, *others, "gelu", True, "torch")
        mlp._backward(out, x, *others, hidden, [True] * 5, "gelu", "torch")
        x, *others = _inputs("patch_merging", dtype)
        for backend in BACKENDS:
            module = patch_merging.backend(backend)
            out = module.patch_merging_fwd(x, *others, 1e-5)
            module.patch_merging_bwd(out, x, *others, [True] * 4, 1e-5)
        for name in ("linear", "product", "convolution", "conv_embed"):
            _with_gradients(CASES[name][0], _inputs(name, dtype), "torch")
    assert not seen


@pytest.mark.parametrize("name", ["linear", "product", "convolution"])
def test_autocast_runs_the_same_way_and_gives_its_dtype(name: str) -> None:
    function, inputs = CASES[name][0], _inputs(name, torch.float32)

    def autocast(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*tensors)

    found = _with_gradients(autocast, inputs, "torch")
    rounded = _with_gradients(function, [x.bfloat16() for x in inputs], "torch")
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], rounded[0], rtol=0, atol=0)
    for grad, low in zip(found[1:], rounded[1:], strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, low.float(), rtol=0.02, atol=0.02)


def test_flops_are_those_of_the_float32_products() -> None:
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            for name in ("linear", "mlp", "patch_merging", "conv_embed"):
                _with_gradients(CASES[name][0], _inputs(name, dtype), "torch")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["linear", "product", "convolution", "mlp"])
def test_it_compiles_in_one_graph(name: str) -> None:
    function, inputs = CASES[name][0], _inputs(name, torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = _with_gradients(compiled, inputs, "torch")
    for ours, eager in zip(found, _with_gradients(function, inputs, "torch"), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_gradients_of_zero(backend: str) -> None:
    x, *others = _inputs("mlp", torch.bfloat16)
    for function, tensors in ((ops.mlp, [x[:0], *others]), (ops.linear, [x[:0], *others[:2]])):
        out, *grads = _with_gradients(function, tensors, backend)
        assert out.shape == (0, 70, len(tensors[-1]))
        assert all((grad == 0).all() for grad in grads)
