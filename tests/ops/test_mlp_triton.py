"""The Triton kernels between the products of mlp against the float64 definition, through the interpreter on a CPU and
on a GPU where there is one: values, gradients, and what must not depend on luck.

Letters: C channels in · F hidden width · E channels out · R rows.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels import bias_activation as kernels_file
from tests.ops.rounding import relative_error

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")

# Far below zero the exponential in a sigmoid is infinite, as it should be; the interpreter's NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    rows: tuple[int, ...]
    hidden: int
    activation: str = "gelu"
    channels: int = 12
    out: int = 8
    biases: bool = True

    def make(self, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        """Draw the tensors, which ask for gradients; the hidden layer gets values of both signs around 1."""
        sizes = {"weight1": (self.hidden, self.channels), "weight2": (self.out, self.hidden)}
        sizes = {"x": (*self.rows, self.channels), **sizes, "bias1": (self.hidden,), "bias2": (self.out,)}
        tensors = {name: torch.randn(size) for name, size in sizes.items()}
        tensors["weight1"] /= self.channels**0.5 / 2
        tensors["weight2"] /= self.hidden**0.5
        tensors = {n: x.to(device=device, dtype=dtype).requires_grad_() for n, x in tensors.items()}
        return tensors if self.biases else tensors | {"bias1": None, "bias2": None}


CASES = {
    **{f"width-384-{name}": Case((2, 40), 384, name) for name in ACTIVATIONS},
    "exact-tiles": Case((64,), 128),
    "ragged": Case((3, 11), 37, "quick_gelu"),
    "columns-beyond-the-width": Case((5, 7), 200, "gelu_tanh"),
    "no-biases": Case((17,), 96, biases=False),
    "one-hidden": Case((150,), 1),
    "one-row-no-batch": Case((), 64),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.mlp(**kwargs)


def plainly(x, weight1, bias1, weight2, bias2, activation="gelu") -> Tensor:
    """Write it as one would in PyTorch."""
    z = F.linear(x, weight1, bias1)
    if activation == "quick_gelu":
        z = z * torch.sigmoid(1.702 * z)
    else:
        z = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.linear(z, weight2, bias2)


def run(function: Any, tensors: dict, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(**tensors, **options)
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, grad_out = case.make(dtype, device), torch.randn(*case.rows, case.out, device=device).to(dtype)
    exact_tensors = {n: None if x is None else x.detach().double().requires_grad_() for n, x in tensors.items()}
    exact = run(ops.mlp_reference, exact_tensors, grad_out.double(), activation=case.activation)
    ours, usual = (run(f, tensors, grad_out, activation=case.activation) for f in (kernels, plainly))
    for name, x in exact.items():
        assert ours[name].dtype == dtype
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= max(allowed, FLOOR[dtype]), (
            f"mlp, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter cuts values off where they become bfloat16")
    check(case, dtype, device)


@given(
    rows=st.integers(1, 40), hidden=st.integers(1, 300), activation=st.sampled_from(ACTIVATIONS), biases=st.booleans()
)
def test_any_shape(rows: int, hidden: int, activation: str, biases: bool) -> None:
    check(Case((rows,), hidden, activation, biases=biases), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_everywhere(activation: str, dtype: torch.dtype, device: str) -> None:
    """From far below zero to far above it, values and slopes, by itself."""
    z = torch.linspace(-12, 12, 4096).view(32, 128).to(device, dtype)
    exact = z.double().requires_grad_()
    identity = torch.eye(128, dtype=torch.float64, device=device)
    wanted = ops.mlp_reference(exact, identity, None, identity, None, activation=activation)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    out = kernels_file.bias_activation_fwd(z, None, activation, False)
    d, again, dbias = kernels_file.bias_activation_bwd(torch.ones_like(z), z, None, activation, True, True)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-3, "atol": 3e-6}
    torch.testing.assert_close(out.double(), wanted.detach(), **tolerance)
    torch.testing.assert_close(d.double(), slope, **tolerance)
    torch.testing.assert_close(dbias.double(), slope.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(again, out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_gradient_the_hidden_layer_is_overwritten(activation: str, device: str) -> None:
    z = torch.randn(70, 96, device=device)
    expected = kernels_file.bias_activation_fwd(z, None, activation, False)
    out = kernels_file.bias_activation_fwd(z, None, activation, True)
    assert out is z and torch.equal(out, expected)


@pytest.mark.parametrize("runs", [1, 3, 50])
def test_more_or_fewer_runs_than_tiles(runs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_file._TileCall, "runs", runs)
    check(Case((90,), 200), torch.float32, device)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_every_subset_of_gradients(biases: bool, device: str) -> None:
    case = Case((3, 9), 40, biases=biases)
    tensors, grad_out = case.make(torch.float32, device), torch.randn(3, 9, case.out, device=device)
    everything = run(kernels, tensors, grad_out)
    names = [name for name, x in tensors.items() if x is not None]
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = {n: x if x is None else x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(kernels, some, grad_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


def test_gradients_are_bit_equal_over_runs(device: str) -> None:
    case = CASES["columns-beyond-the-width"]
    tensors, grad_out = case.make(torch.float16, device), torch.randn(*case.rows, case.out, device=device)
    first, *others = (run(kernels, tensors, grad_out, activation=case.activation) for _ in range(3))
    assert all(torch.equal(x, other[name]) for other in others for name, x in first.items())


def test_strides(device: str) -> None:
    case = Case((3, 9), 40)
    tensors, grad_out = case.make(torch.float32, device), torch.randn(3, case.out, 9, device=device).mT
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for n, x in tensors.items()}
    expected, got = run(kernels, tensors, grad_out.contiguous()), run(kernels, turned, grad_out)
    assert not turned["x"].is_contiguous() and not turned["weight1"].is_contiguous()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


def test_no_rows(device: str) -> None:
    case = replace(CASES["no-biases"], rows=(0, 4), biases=True)
    got = run(kernels, case.make(torch.float32, device), torch.randn(0, 4, case.out, device=device))
    assert got["out"].shape == (0, 4, case.out) and got["dx"].shape == (0, 4, case.channels)
    assert not any(got[f"d{name}"].any() for name in ("weight1", "bias1", "weight2", "bias2"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row_and_is_not_lost(activation: str, device: str) -> None:
    case = Case((5,), 40, activation)
    tensors, grad_out = case.make(torch.float32, device), torch.randn(5, case.out, device=device)
    with torch.no_grad():
        tensors["x"][1, 2] = torch.nan
    ours, exact = (run(f, tensors, grad_out, activation=activation) for f in (kernels, ops.mlp_reference))
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


def test_the_wide_tensor_is_kept_once_and_inference_equals_training(device: str) -> None:
    tensors = CASES["width-384-gelu"].make(torch.float16, device)
    trained = kernels(**tensors)
    with torch.no_grad():
        assert torch.equal(kernels(**tensors), trained)
    saved = [x for x in trained.grad_fn.saved_tensors if x is not None]
    assert sum(x.numel() for x in saved if all(x is not y for y in tensors.values())) == 80 * 384


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["width-384-gelu", "no-biases"])
def test_opcheck(name: str, train: bool, device: str) -> None:
    tensors = CASES[name].make(torch.float16, device)
    given = [tensors[n] for n in ("x", "weight1", "bias1", "weight2", "bias2")]
    given = [x if x is None else x.requires_grad_(train) for x in given]
    tolerances = {"rtol": 1e-2, "atol": 1e-2}
    torch.library.opcheck(torch.ops.florence_fast.mlp.default, (*given, "gelu", train, "triton"), **tolerances)


def test_compiles_in_full(device: str) -> None:
    case = CASES["width-384-gelu"]
    tensors, grad_out = case.make(torch.float32, device), torch.randn(*case.rows, case.out, device=device)
    expected, backend = run(kernels, tensors, grad_out), "inductor" if device == "cuda" else "aot_eager"
    with ops.backend("triton"):
        got = run(torch.compile(ops.mlp, fullgraph=True, backend=backend), tensors, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_that_the_interpreter_cannot_do(dtype: torch.dtype) -> None:
    tensors = CASES["ragged"].make(dtype, "cpu")
    with pytest.raises(RuntimeError, match="float"):
        kernels(**tensors)
    assert ops.mlp(**tensors).isfinite().all()


def test_auto_never_interprets() -> None:
    assert ops.dispatch.choose("mlp", **CASES["ragged"].make(torch.float32, "cpu")) != "triton"
