"""What layer_norm computes and promises: the definition against torch.nn.functional in float64 and by finite
differences, the ``torch`` backend against the definition, and torch.library's contract, compile, export and autocast.

Letters: B samples · C channels.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from florence_fast import ops

FORWARD = torch.ops.florence_fast.layer_norm.default
BACKWARD = torch.ops.florence_fast.layer_norm_backward.default

SHAPES = {
    "map": (2, 3, 5, 12),
    "text": (3, 7, 8),
    "matrix": (6, 5),
    "one-channel": (4, 1),
    "batch-1": (1, 4, 16),
    "one-row-no-batch": (9,),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
FORMS = {
    "plain": (),
    "no-weights": ("bare",),
    "bias-alone": ("no-weight",),
    "residual": ("residual",),
    "drop-path": ("residual", "residual_scale"),
    "drop-path-no-weights": ("residual", "residual_scale", "bare"),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def make(shape: tuple[int, ...], form: tuple[str, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw the tensors, which ask for gradients but for the factors."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"x": torch.randn(shape).to(dtype) * 2 + 1}
    if "bare" not in form and "no-weight" not in form:
        tensors["weight"] = torch.randn(shape[-1], dtype=wide)
    if "bare" not in form:
        tensors["bias"] = torch.randn(shape[-1], dtype=wide)
    if "residual" in form:
        tensors["residual"] = torch.randn(shape).to(dtype)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    if "residual_scale" in form and len(shape) > 1:
        tensors["residual_scale"] = (torch.arange(shape[0]) % 3 != 0) * torch.tensor(1 / 0.9)
    return tensors


def outputs(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    out = function(**tensors, **options)
    return out if isinstance(out, tuple) else (out,)


def run(function: Callable[..., Any], tensors: dict[str, Tensor], grads_out: Any = None) -> dict[str, Tensor]:
    """Give the results and every gradient by name."""
    outs = outputs(function, tensors)
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    grads_out = [
        torch.ones_like(y) if g is None else g.to(y.dtype) for y, g in zip(outs, grads_out or outs, strict=True)
    ]
    grads = torch.autograd.grad(outs, list(wanted.values()), grads_out, materialize_grads=True)
    found = {f"out{number}": y.detach() for number, y in enumerate(outs)}
    return found | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def grads_for(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [torch.randn_like(tensors["x"]) for _ in range(2 if "residual" in tensors else 1)]


def by_library(x, weight=None, bias=None, residual=None, residual_scale=None, eps=1e-5):
    """Write it as one would in PyTorch; shares no code with the package."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # else the library refuses a bias of another dtype than x
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if residual_scale is not None:
        x = torch.einsum("b...,b->b...", x, residual_scale.to(x.dtype))
    total = residual + x
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


@shapes
@forms
def test_reference_equals_the_library(shape: tuple[int, ...], form: tuple[str, ...]) -> None:
    tensors = make(shape, form)
    grads_out = grads_for(tensors)
    got, exact = (run(f, tensors, grads_out) for f in (ops.layer_norm_reference, by_library))
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-9 if shape[-1] == 1 else 1e-12)


@forms
def test_reference_by_finite_differences(form: tuple[str, ...]) -> None:
    tensors = make((2, 3, 4), form)
    names = [name for name, x in tensors.items() if x.requires_grad]
    fixed = {name: x for name, x in tensors.items() if name not in names}
    assert torch.autograd.gradcheck(
        lambda *xs: ops.layer_norm_reference(**dict(zip(names, xs, strict=True)), **fixed),
        [tensors[name] for name in names],
    )


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 8.0]])
    total, norm = ops.layer_norm(x, eps=0, residual=torch.ones(2, 2), residual_scale=torch.tensor([2.0, 0.0]))
    assert torch.equal(total, torch.tensor([[3.0, 7.0], [1.0, 1.0]]))
    assert torch.equal(norm[0], torch.tensor([-1.0, 1.0])) and norm[1].isnan().all()


@shapes
@forms
def test_torch_backend_equals_reference(shape: tuple[int, ...], form: tuple[str, ...], poisoned_memory: None) -> None:
    tensors = make(shape, form)
    grads_out = grads_for(tensors)
    with ops.backend("torch"):
        got = run(ops.layer_norm, tensors, grads_out)
    for name, x in run(ops.layer_norm_reference, tensors, grads_out).items():
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-9 if shape[-1] == 1 else 1e-12)


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "weights-as-x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@forms
def test_torch_backend_is_as_exact_as_plain_pytorch(form: tuple, dtype: torch.dtype, weights: Any) -> None:
    tensors = make((4, 33, 96), form, dtype)
    for name in {"weight", "bias"} & set(tensors):
        tensors[name] = tensors[name].detach().to(weights or dtype).requires_grad_()
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in tensors.items()}
    grads_out = [g.to(dtype) for g in grads_for(exact)]
    with ops.backend("torch"):
        ours, usual, wanted = (
            run(f, t, grads_out)
            for f, t in ((ops.layer_norm, tensors), (by_library, tensors), (ops.layer_norm_reference, exact))
        )
    for name, x in wanted.items():
        error, plain = (((y[name].double() - x).norm() / x.norm()).item() for y in (ours, usual))
        assert ours[name].dtype == (dtype if name.startswith("out") else tensors[name[1:]].dtype), name
        assert error <= max((2 if name.startswith("out") else 3) * plain, 1e-6), (name, error, plain)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_float32_stream_beside_a_16_bit_branch(backend: str) -> None:
    """What autocast makes of a block: the branch comes from a linear layer, the stream stays float32."""
    x, residual = torch.randn(2, 5, 16).bfloat16().requires_grad_(), torch.randn(2, 5, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    with ops.backend(backend):
        total, norm = ops.layer_norm(x, weight, residual=residual)
        grads = torch.autograd.grad((total * norm).sum(), (x, residual, weight))
    assert torch.equal(total, x.float() + residual) and norm.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(grads[0], grads[1].bfloat16())


def test_every_subset_of_gradients() -> None:
    tensors = make((3, 4, 6), FORMS["drop-path"])
    grads_out = grads_for(tensors)
    everything = run(ops.layer_norm, tensors, grads_out)
    names = [name for name in tensors if name != "residual_scale"]
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(ops.layer_norm, some, grads_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "norm"])
@pytest.mark.parametrize("form", ["residual", "drop-path"])
def test_one_of_the_two_results_is_enough(form: str, used: int) -> None:
    tensors = make((3, 4, 6), FORMS[form])
    names = [name for name in tensors if name != "residual_scale"]
    grads, exact = (
        torch.autograd.grad(
            outputs(f, tensors)[used].square().sum(), [tensors[n] for n in names], materialize_grads=True
        )
        for f in (ops.layer_norm, ops.layer_norm_reference)
    )
    for name, grad, wanted in zip(names, grads, exact, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    tensors = make((3, 4, 6), FORMS["drop-path"], dtype)
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in tensors.items()}
    with ops.backend("torch"):
        totals = [ops.layer_norm(**t)[0] for t in (tensors, exact)]
    grads = [torch.autograd.grad(y.sum(), t["x"])[0] for y, t in zip(totals, (tensors, exact), strict=True)]
    for got, wanted in (totals, grads):
        assert (got.double() - wanted).norm() <= 1.01 * (wanted.to(dtype).double() - wanted).norm()


def test_factors_are_constants() -> None:
    tensors = make((3, 4, 6), FORMS["drop-path"])
    tensors["residual_scale"].requires_grad_()
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            total, _ = ops.layer_norm(**tensors)
        assert torch.autograd.grad(total.sum(), tensors["residual_scale"], allow_unused=True) == (None,)


def op_arguments(form: tuple[str, ...], train: bool = True, dtype: torch.dtype = torch.float32) -> tuple:
    tensors = make((2, 3, 4, 8), form, dtype)
    names = ("x", "residual", "residual_scale", "weight", "bias")
    given = [tensors.get(name) if train or name not in tensors else tensors[name].detach() for name in names]
    return *given, 1e-5, dtype, dtype, "torch"


@forms
@pytest.mark.parametrize("train", [True, False])
def test_opcheck(form: tuple[str, ...], train: bool) -> None:
    torch.library.opcheck(FORWARD, op_arguments(form, train))


@pytest.mark.parametrize("needs", [[True, True, True, True], [False, True, False, False], [True, False, False, True]])
def test_opcheck_backward(needs: list[bool]) -> None:
    arguments = op_arguments(FORMS["drop-path"], train=False)
    norm, total, mean, rstd = FORWARD(*arguments)
    tensors = (torch.randn_like(norm), torch.randn_like(total), total, *arguments[2:5], mean, rstd)
    torch.library.opcheck(BACKWARD, (*tensors, needs, 1e-5, torch.float32, torch.float32, "torch"))


def test_what_is_kept_is_the_sum_and_not_what_it_is_made_of() -> None:
    tensors = make((2, 3, 4, 8), FORMS["drop-path"])
    total, norm = ops.layer_norm(**tensors)
    saved = [x for x in norm.grad_fn.saved_tensors if x is not None]
    assert any(x.data_ptr() == total.data_ptr() for x in saved)
    assert not any(x is tensors["x"] or x is tensors["residual"] for x in saved)


def add_and_norm(x: Tensor, residual: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.layer_norm(x, weight, bias, residual=residual, residual_scale=scale)


def block_inputs(*shape: int) -> tuple[Tensor, ...]:
    x, residual = (torch.randn(*shape, 8, requires_grad=True) for _ in range(2))
    return x, residual, torch.rand(shape[0]), torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)


def grads_of(outs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.square().sum() for y in outs), [x for x in inputs if x.requires_grad])


def test_compiles_once_for_every_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(add_and_norm, fullgraph=True, dynamic=True, backend=counter)
    compiled(*block_inputs(2, 6, 9))
    at_first = counter.frame_count  # 2: torch tries eps as a symbol before it takes it for a constant
    for shape in ((2, 6, 9), (3, 6, 9), (7, 12, 5)):
        inputs = block_inputs(*shape)
        got, expected = compiled(*inputs), add_and_norm(*inputs)
        assert all(map(torch.equal, got, expected)), shape
        assert all(map(torch.equal, grads_of(got, inputs), grads_of(expected, inputs))), shape
        assert counter.frame_count == at_first, f"compiled again for {shape}"


def test_inductor() -> None:
    inputs = block_inputs(2, 5)
    torch.testing.assert_close(torch.compile(add_and_norm, fullgraph=True)(*inputs), add_and_norm(*inputs))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return add_and_norm(x, residual, scale, self.weight, self.bias)


def test_export_with_dynamic_sizes() -> None:
    module, (batch, tokens) = Norm(), (Dim("batch", min=2), Dim("tokens", min=2))
    dims = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch})
    exported = torch.export.export(module, block_inputs(2, 5)[:3], dynamic_shapes=dims).module()
    inputs = block_inputs(4, 3)[:3]
    assert all(map(torch.equal, exported(*inputs), module(*inputs)))


def test_meta_device() -> None:
    inputs = tuple(x.detach().to("meta").requires_grad_(x.requires_grad) for x in block_inputs(2, 5))
    outs = add_and_norm(*inputs)
    assert [y.shape for y in outs] == [(2, 5, 8)] * 2
    assert [g.shape for g in grads_of(outs, inputs)] == [x.shape for x in inputs if x.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_on_a_cpu_gives_what_the_library_gives(dtype: torch.dtype, backend: str) -> None:
    x, weight = torch.randn(2, 5, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert ops.layer_norm(x, weight).dtype == F.layer_norm(x, (8,), weight).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_on_cuda_gives_what_the_library_gives(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 8, dtype=dtype, device="cuda"), torch.randn(8, dtype=dtype, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert ops.layer_norm(x, weight).dtype == F.layer_norm(x, (8,), weight).dtype
        total, norm = ops.layer_norm(x, weight, residual=x)
    assert total.dtype == dtype and norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_norm_of_another_dtype_than_the_sum(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's autocast asks for, on a CPU: 16-bit in, a float32 norm out."""
    monkeypatch.setattr(ops.dispatch, "float32_autocast_dtype", lambda *_: torch.float32)
    tensors = make((2, 5, 8), FORMS["drop-path"], torch.bfloat16)
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in tensors.items()}
    with ops.backend(backend):
        total, norm = ops.layer_norm(**tensors)
    assert (total.dtype, norm.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(norm, F.layer_norm(total.float(), (8,), tensors["weight"], tensors["bias"]))
    names = ["x", "residual", "weight", "bias"]
    grads = torch.autograd.grad(norm.square().sum(), [tensors[n] for n in names])
    wanted = torch.autograd.grad(by_library(**exact)[1].square().sum(), [exact[n] for n in names])
    for name, grad, x in zip(names, grads, wanted, strict=True):
        assert grad.dtype == tensors[name].dtype
        assert (grad.double() - x).norm() <= 0.02 * x.norm(), name


def test_activation_checkpointing() -> None:
    inputs = block_inputs(2, 5)
    plain, again = add_and_norm(*inputs), checkpoint(add_and_norm, *inputs, use_reentrant=False)
    assert all(map(torch.equal, grads_of(plain, inputs), grads_of(again, inputs)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    tensors = make(shape, FORMS["drop-path"], torch.float32)
    with ops.backend(backend):
        got = run(ops.layer_norm, tensors)
    assert got["out0"].shape == got["out1"].shape == got["dx"].shape == got["dresidual"].shape == shape
    assert not got["dweight"].any() and not got["dbias"].any()


def test_any_strides_and_the_inputs_are_left_alone() -> None:
    tensors = make((4, 5, 6), FORMS["drop-path"])
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for n, x in tensors.items()}
    before = {n: x.detach().clone() for n, x in turned.items()}
    grads_out = grads_for(tensors)
    got, expected = (
        run(ops.layer_norm, turned, [g.mT.contiguous().mT for g in grads_out]),
        run(ops.layer_norm, tensors, grads_out),
    )
    assert all(torch.equal(x, expected[name]) for name, x in got.items())
    assert all(y.is_contiguous() for y in outputs(ops.layer_norm, turned))
    assert all(torch.equal(x, before[name]) for name, x in turned.items())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_stays_in_its_row_and_is_not_lost(backend: str) -> None:
    tensors = make((3, 4, 6), FORMS["drop-path"])
    with torch.no_grad():
        tensors["x"][0, 1, 2] = torch.nan  # of a sample that drop path leaves out: zero times NaN
    with ops.backend(backend):
        got = run(ops.layer_norm, tensors)
    assert got["out0"].isnan().nonzero().tolist() == [[0, 1, 2]]
    for name in ("out1", "dx", "dresidual"):
        rows = got[name].isnan()
        assert rows[0, 1].any() and rows.sum() == rows[0, 1].sum(), name
    assert got["dweight"].isnan().all()


def test_second_derivatives_are_those_of_the_reference() -> None:
    tensors = make((3, 6), FORMS["plain"])

    def second_derivative() -> Tensor:
        (grad,) = torch.autograd.grad(ops.layer_norm(**tensors).square().sum(), tensors["x"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors["weight"])[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


X = torch.randn(2, 5, 8)
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., C) with C at least 1, got ()"),
    ({"x": X[..., :0]}, ValueError, "x must have shape (..., C) with C at least 1, got (2, 5, 0)"),
    ({"eps": -1e-5}, ValueError, "eps must be a number of at least 0, got -1e-05"),
    ({"eps": "small"}, ValueError, "eps must be a number of at least 0, got 'small'"),
    ({"weight": torch.ones(7)}, ValueError, "weight must have shape (8,), got (7,)"),
    ({"weight": 1.0}, TypeError, "weight must be a floating-point tensor, got float"),
    ({"bias": torch.ones(8, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
    ({"residual": X[:1]}, ValueError, "residual must have shape (2, 5, 8), got (1, 5, 8)"),
    ({"residual_scale": torch.ones(2)}, ValueError, "residual_scale is the factor of x in residual + residual_scale"),
    ({"residual": X, "residual_scale": torch.ones(5)}, ValueError, "residual_scale must have shape (2,), got (5,)"),
    (
        {"x": X[0, 0], "residual": X[0, 0], "residual_scale": torch.ones(8)},
        ValueError,
        "residual_scale needs x of shape (B, ..., C), got (8,)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.layer_norm(**{"x": X, **change})
