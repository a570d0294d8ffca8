"""The native activation of mlp against float64, at every level that runs here, and the op around it: values, gradients,
and what must not depend on threads, strides or luck.

Letters: C channels in · F hidden width · E channels out · R rows.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from florence_fast.ops.mlp import cpp as mlp_cpp
from florence_fast.ops.mlp.cpp import ACTIVATIONS, bias_activation_bwd, bias_activation_fwd
from tests.ops.test_mlp import NAMES
from tests.ops.test_mlp_triton import Case, plainly, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
FLOOR = 1e-6
"""Relative errors below this are float32's rounding in whatever order, and are not compared."""

CASES = {
    **{f"width-384-{name}": Case((2, 40), 384, name) for name in ACTIVATIONS},
    "ragged": Case((3, 11), 37, "quick_gelu"),
    "shorter-than-a-vector": Case((45,), 3, "gelu_tanh", channels=5, out=7),
    "no-biases": Case((17,), 96, biases=False),
    "one-hidden": Case((150,), 1),
    "one-row-no-batch": Case((), 64),
    "more-rows-than-runs": Case((3, 61), 20, "gelu_tanh"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def definition(x: Tensor, activation: str) -> Tensor:
    """Apply the activation in float64 so that its tail, too, has all its digits."""
    x = x.double()
    if activation == "gelu":
        return x * torch.special.erfc(-x * 0.5**0.5) / 2
    slope = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3) if activation == "gelu_tanh" else 1.702 * x
    return x * torch.sigmoid(slope)


def value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Call the kernels on one row; the backward's own values must be the forward's."""
    rows = x.view(1, -1)
    value = bias_activation_fwd(rows, None, activation, False)
    slope, again, _ = bias_activation_bwd(torch.ones_like(rows), rows, None, activation, True, False)
    assert torch.equal(again.nan_to_num(7.0), value.nan_to_num(7.0))
    return value[0], slope[0]


def exact_value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = x.double().requires_grad_()
    value = definition(wide, activation)
    return value.detach(), torch.autograd.grad(value.sum(), wide)[0]


def finite(dtype: torch.dtype, most: float = 12.0) -> Tensor:
    """Return every number of 16 bits up to ``most``, of either sign."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    return every[every.abs() <= most]


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(dtype: torch.dtype, activation: str, level: str) -> None:
    """Two units in the last place; of a slope, where it crosses zero, in that of the larger term.

    Below 1e-12 a tail may be 0.
    """
    x, info = finite(dtype), torch.finfo(dtype)
    got, exact = value_and_slope(x, activation), exact_value_and_slope(x, activation)
    gate = (definition(x, activation) / x.double()).nan_to_num(0.5)
    sizes = (exact[0].abs(), exact[1].abs().max(gate))
    for name, ours, right, size in zip(("value", "slope"), got, exact, sizes, strict=True):
        unit = torch.exp2(size.clamp(min=info.tiny).log2().floor()) * info.eps
        error = ((ours.double() - right).abs() - 1e-12) / unit
        worst = error.argmax()
        assert error[worst] <= 2, f"{name} of {x[worst]}: {ours[worst]} instead of {right[worst]}, {error[worst]} ulp"


@activations
def test_float32_keeps_its_digits(activation: str, level: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_003), torch.randn(10_000), torch.randn(1000) * 1e-20])
    for ours, right in zip(value_and_slope(x, activation), exact_value_and_slope(x, activation), strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()
        assert (ours.double() - right).abs().max() <= 3e-6 * right.abs().max()
    value, right = value_and_slope(x, activation)[0].double(), definition(x, activation)
    shown = right.abs() > 1e-12  # below that a tail may be 0
    assert ((value - right).abs() / right.abs())[shown].max() <= 2e-5
    assert (value - right).abs()[~shown].max() <= 1e-12


@activations
@DTYPES
def test_what_is_no_number_and_what_is_huge(dtype: torch.dtype, activation: str, level: str) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([math.nan, math.inf, most, most / 7, -most / 7, -most, 300.0, -300.0, 0.0, -0.0]).to(dtype)
    value, slope = value_and_slope(x, activation)
    assert value[0].isnan() and slope[0].isnan() and value[1] == math.inf
    assert torch.equal(value[2:], torch.where(x > 0, x, 0)[2:])
    torch.testing.assert_close(slope[2:].float(), torch.tensor([1, 1, 0, 0, 1, 0, 0.5, 0.5]), rtol=1e-6, atol=0)


def grad_for(tensors: dict[str, Tensor | None]) -> Tensor:
    return torch.randn(*tensors["x"].shape[:-1], len(tensors["weight2"])).to(tensors["x"].dtype)


def check(case: Case, dtype: torch.dtype, what: object) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors = case.make(dtype, "cpu")
    wide = {n: None if x is None else x.detach().double().requires_grad_() for n, x in tensors.items()}
    grad_out, option = grad_for(tensors), {"activation": case.activation}
    exact = run(ops.mlp_reference, wide, grad_out.double(), **option)
    ours, usual = (run(f, tensors, grad_out, **option) for f in (ops.mlp, plainly))
    for name, x in exact.items():
        assert ours[name].dtype == dtype, name
        error, plain = ((y[name].double() - x).norm().item() for y in (ours, usual))
        allowed = max((2 if name == "out" else 3) * plain, FLOOR * x.norm().item())
        assert error <= allowed, f"mlp, {name}, {dtype}, {case}, {what}: {error:.2e}, allowed is {allowed:.2e}"
    with torch.no_grad():
        error = (ops.mlp(**tensors, **option).double() - exact["out"]).norm()
        assert error <= max(2 * (usual["out"].double() - exact["out"]).norm(), FLOOR * exact["out"].norm())


@DTYPES
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(case, dtype, level)


@given(
    rows=st.lists(st.integers(1, 20), max_size=3),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40)),
    activation=st.sampled_from(ACTIVATIONS),
    biases=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    rows: list[int], sizes: tuple[int, int, int], activation: str, biases: bool, dtype: torch.dtype
) -> None:
    hidden, channels, out = sizes
    torch.manual_seed(hidden)
    check(Case(tuple(rows), hidden, activation, channels, out, biases), dtype, rows)


@pytest.mark.parametrize("rows", [1, 5, 10], ids=lambda n: f"{n}-rows-a-chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_some_rows_at_a_time(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {n: x.detach() for n, x in Case((2, 16), 37).make(dtype, "cpu").items()}
    whole = ops.mlp(**tensors)
    monkeypatch.setattr(mlp_cpp, "CHUNK_BYTES", rows * 37 * whole.element_size())
    monkeypatch.setattr(mlp_cpp, "CHUNK_OVER_WEIGHT", 0)
    torch.testing.assert_close(ops.mlp(**tensors), whole)
    exact = ops.mlp_reference(**{n: x.double() for n, x in tensors.items()})
    assert (ops.mlp(**tensors).double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * exact.norm()


@pytest.mark.parametrize("rows", [1, 5, 10], ids=lambda n: f"{n}-rows-a-chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_some_rows_at_a_time(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Case((2, 16), 37).make(dtype, "cpu")
    grad_out = grad_for(tensors)
    whole = run(ops.mlp, tensors, grad_out)
    monkeypatch.setattr(mlp_cpp, "BACKWARD_CHUNK_BYTES", rows * 37 * grad_out.element_size())
    monkeypatch.setattr(mlp_cpp, "CHUNK_OVER_WEIGHT", 0)
    for name, x in run(ops.mlp, tensors, grad_out).items():
        bound = (1e-6 if dtype == torch.float32 else 1e-2) * whole[name].double().norm()
        assert (x.double() - whole[name].double()).norm() <= bound, name


def test_chunks_are_even_and_long_beside_the_weights() -> None:
    """A few rows left over would cost as much as a chunk: every chunk packs the whole weights."""
    wide, narrow = torch.empty(1536, 384), torch.empty(384, 96)
    assert mlp_cpp._rows_of_chunk(1568, wide, wide.T, 8 << 20) == 1568
    assert mlp_cpp._rows_of_chunk(25088, narrow, narrow.T, 8 << 20) == -(-25088 // 5)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_every_subset_of_gradients(biases: bool) -> None:
    tensors = Case((3, 7), 37, biases=biases).make(torch.float32, "cpu")
    grad_out = grad_for(tensors)
    everything = run(ops.mlp, tensors, grad_out)
    names = [n for n, x in tensors.items() if x is not None]
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = {n: None if x is None else x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(ops.mlp, some, grad_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


@DTYPES
def test_the_activation_is_bit_equal_for_any_number_of_threads(dtype: torch.dtype, level: str) -> None:
    """The products around it are PyTorch's own."""
    hidden, grad, bias = (torch.randn(*shape).to(dtype) for shape in ((331, 203), (331, 203), (203,)))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        grads = bias_activation_bwd(grad, hidden, bias, "gelu", True, True)
        found.append((bias_activation_fwd(hidden, bias, "gelu", False), *grads))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_in_place_or_not(level: str) -> None:
    hidden, bias = torch.randn(7, 37), torch.randn(37)
    before = hidden.clone()
    out = bias_activation_fwd(hidden, bias, "gelu", False)
    assert torch.equal(hidden, before)
    there = bias_activation_fwd(hidden, bias, "gelu", True)
    assert there.data_ptr() == hidden.data_ptr() and torch.equal(hidden, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_addresses(dtype: torch.dtype, level: str) -> None:
    tensors = Case((3, 11), 37).make(dtype, "cpu")
    grad_out = grad_for(tensors)
    expected = run(ops.mlp, tensors, grad_out)
    before = {n: x.detach().clone() for n, x in tensors.items()}
    turned = {
        n: x.detach().mT.contiguous().mT if x.ndim > 1 else torch.stack([x.detach()] * 2, 1)[:, 0]
        for n, x in tensors.items()
    }
    shifted = {
        n: torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape) for n, x in tensors.items()
    }
    for others in (turned, shifted):
        others = {n: x.requires_grad_() for n, x in others.items()}
        for name, x in run(ops.mlp, others, grad_out.mT.contiguous().mT).items():
            # Products of other strides may take other paths of the library.
            torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(x, before[n]) for n, x in others.items())


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows(shape: tuple[int, ...], level: str) -> None:
    tensors = Case(shape, 37).make(torch.float32, "cpu")
    got = run(ops.mlp, tensors, grad_for(tensors))
    with torch.no_grad():
        assert ops.mlp(**tensors).shape == got["out"].shape == (*shape, 8)
    assert got["dx"].shape == tensors["x"].shape
    assert not any(got[f"d{name}"].any() for name in tensors if name != "x")


@activations
def test_nan_stays_in_its_row_and_is_not_lost(activation: str, level: str) -> None:
    tensors = Case((3,), 37).make(torch.float32, "cpu")
    with torch.no_grad():
        tensors["x"][1, 2] = math.nan
    got = run(ops.mlp, tensors, torch.ones(3, 8), activation=activation)
    for name in ("out", "dx"):
        assert got[name].isnan().all(1).tolist() == [False, True, False] and not got[name][::2].isnan().any()
    assert all(got[f"d{name}"].isnan().any() for name in ("weight1", "bias1", "weight2"))


@activations
@pytest.mark.parametrize("train", [True, False])
def test_opcheck(activation: str, train: bool) -> None:
    tensors = Case((2, 3), 37).make(torch.float32, "cpu")
    tensors = [tensors[name].requires_grad_(train) for name in NAMES]
    torch.library.opcheck(torch.ops.florence_fast.mlp.default, (*tensors, activation, train, "cpp"))


@pytest.mark.parametrize("needs", [[True] * 5, [False, False, False, True, False], [True, False, False, False, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_backward(needs: list[bool], dtype: torch.dtype) -> None:
    tensors = Case((2, 3), 37).make(dtype, "cpu")
    tensors = [tensors[name].detach() for name in NAMES]
    out, hidden = torch.ops.florence_fast.mlp(*tensors, "gelu", True, "cpp")
    arguments = (torch.randn_like(out), *tensors, hidden, needs, "gelu", True, "cpp")
    torch.library.opcheck(torch.ops.florence_fast.mlp_backward.default, arguments)


def test_compiles_in_full() -> None:
    tensors = Case((2, 3), 37).make(torch.float32, "cpu")
    compiled, grad_out = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager"), grad_for(tensors)
    got, expected = run(compiled, tensors, grad_out), run(ops.mlp, tensors, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


def test_autocast() -> None:
    tensors = Case((2, 3), 37).make(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.mlp(**tensors)
    low = ops.mlp(**{n: x.bfloat16() for n, x in tensors.items()})
    assert out.dtype == torch.bfloat16 and torch.equal(out, low)


def test_what_it_cannot_take() -> None:
    tensors = {n: x.detach().double() for n, x in Case((2, 3), 37).make(torch.float32, "cpu").items()}
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run mlp: tensors must be float32.*float64"):
        ops.mlp(**tensors)
    with ops.backend("auto"):
        assert ops.mlp(**tensors).dtype == torch.float64
    meta = {n: x.to("meta") for n, x in tensors.items()}
    assert "native kernels run on the CPU, not on meta" in ops.OPS["mlp"].unsupported_reasons("cpp", **meta)
