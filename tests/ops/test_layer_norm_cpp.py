"""The native kernels of layer_norm against the float64 definition, at every level that runs here: values, gradients,
and what must not depend on threads, strides or luck.

Letters: B samples · C channels.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from tests.ops.test_layer_norm import FORMS, by_library, grads_for, make, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FLOOR = 1e-6
"""Relative errors below this are float32's rounding in whatever order, and are not compared."""

SHAPES = {
    "swin-tiny": (2, 49, 96),
    "wide": (2, 5, 768),
    "ragged-rows-and-channels": (3, 11, 37),
    "shorter-than-a-vector": (5, 3),
    "one-channel": (7, 1),
    "one-row": (1, 4096),
    "many-runs": (3, 700, 20),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def reference(**tensors: Tensor) -> Any:
    return ops.layer_norm_reference(**tensors)


def exactly(tensors: dict[str, Tensor], grads_out: list[Tensor]) -> dict[str, Tensor]:
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    return run(reference, wide, [g.double() for g in grads_out])


def check(tensors: dict[str, Tensor], dtype: torch.dtype, what: object) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    grads_out = [g.to(dtype) for g in grads_for(tensors)]
    exact = exactly(tensors, grads_out)
    ours, usual = run(ops.layer_norm, tensors, grads_out), run(by_library, tensors, grads_out)
    for name, x in exact.items():
        is_result = name.startswith("out")
        assert ours[name].dtype == (dtype if is_result else tensors[name[1:]].dtype), name
        error, plain = ((y[name].double() - x).norm().item() for y in (ours, usual))
        # A single channel is its own mean: the gradient through its norm is zero, or the rounding of rstd = 316.
        scale = max(x.norm().item(), 1.0 if x.shape[-1] > 1 else 316.0)
        allowed = max((2 if is_result else 3) * plain, FLOOR * scale)
        assert error <= allowed, f"layer_norm, {name}, {dtype}, {what}: {error:.2e}, allowed is {allowed:.2e}"


@DTYPES
@shapes
def test_as_exact_as_plain_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, level: str, poisoned_memory: None
) -> None:
    for form in FORMS:
        check(make(shape, FORMS[form], dtype), dtype, (form, level))


@DTYPES
def test_a_mean_far_beyond_the_spread(dtype: torch.dtype, level: str) -> None:
    tensors = make((4, 9, 96), FORMS["residual"], dtype)
    with torch.no_grad():
        tensors["residual"] += 3000 if dtype == torch.float32 else 20
    check(tensors, dtype, level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_first_element_far_from_the_others(form: tuple[str, ...], dtype: torch.dtype, level: str) -> None:
    """It is what the moments of 16-bit rows are taken about."""
    tensors = make((2, 9, 1024), form, dtype)
    with torch.no_grad():
        tensors["x"][..., 1:] *= 1e-3
        tensors["x"][..., 0] = 300
    check(tensors, dtype, level)


def test_float32_keeps_the_digits_that_the_row_has(level: str) -> None:
    """At a mean of 10,000 spreads the library's statistics lose; ours are of the differences from the mean."""
    x = torch.randn(64, 96) + 1e4
    exact = reference(x=x.double())
    ours, usual = ops.layer_norm(x).double(), by_library(x).double()
    assert (ours - exact).norm() <= 1e-5 * exact.norm(), (ours - exact).norm() / exact.norm()
    assert (ours - exact).norm() <= 2 * (usual - exact).norm()


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    channels=st.integers(1, 200),
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(shape: list[int], channels: int, form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    check(make((*shape, channels), FORMS[form], dtype), dtype, (shape, channels, form))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits(weights: torch.dtype, level: str) -> None:
    tensors = make((4, 9, 40), FORMS["drop-path"], weights)
    for name in ("weight", "bias"):
        tensors[name] = tensors[name].detach().to(weights).requires_grad_()
    check(tensors, weights, level)


@pytest.mark.parametrize(
    ("x", "residual"),
    [pair for pair in itertools.product(native.DTYPES, repeat=2) if pair[0] != pair[1]],
    ids=lambda dtype: str(dtype)[6:],
)
def test_a_stream_of_another_dtype_than_the_branch(x: torch.dtype, residual: torch.dtype, level: str) -> None:
    """What autocast makes of a block, and every other mixture: the sum and its norm are float32."""
    tensors = make((3, 9, 40), FORMS["drop-path"], torch.float32)
    for name, dtype in (("x", x), ("residual", residual)):
        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
    grads_out = grads_for({**tensors, "x": tensors["x"].float()})
    got, wanted = run(ops.layer_norm, tensors, grads_out), exactly(tensors, grads_out)
    for name, exact in wanted.items():
        dtype = torch.float32 if name.startswith("out") else tensors[name[1:]].dtype
        tolerance = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
        assert got[name].dtype == dtype, name
        assert (got[name].double() - exact).norm() <= tolerance * exact.norm(), name


def test_the_statistics_are_those_of_the_rounded_sum(level: str) -> None:
    total, norm = ops.layer_norm(torch.randn(9, 40).bfloat16(), residual=(torch.randn(9, 40) + 30).bfloat16())
    again = ops.layer_norm(total)
    assert torch.equal(norm, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    tensors = make((3, 4, 6), FORMS["drop-path"], dtype)
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    (total, _), (exact, _) = ops.layer_norm(**tensors), reference(**wide)
    grads = [torch.autograd.grad(y.sum(), t["x"])[0] for y, t in ((total, tensors), (exact, wide))]
    for got, wanted in ((total, exact), grads):
        assert (got.double() - wanted).norm() <= 1.01 * (wanted.to(dtype).double() - wanted).norm()


@pytest.mark.parametrize("form", ["residual", "drop-path"])
def test_every_subset_of_gradients(form: str) -> None:
    tensors = make((3, 19, 40), FORMS[form], torch.float32)
    grads_out = grads_for(tensors)
    everything = run(ops.layer_norm, tensors, grads_out)
    names = [name for name, x in tensors.items() if x.requires_grad]
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(ops.layer_norm, some, grads_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "norm"])
def test_one_of_the_two_results_is_enough(used: int) -> None:
    tensors = make((3, 9, 40), FORMS["drop-path"], torch.float32)
    names = [name for name, x in tensors.items() if x.requires_grad]
    got, wanted = (
        torch.autograd.grad(f(**tensors)[used].square().sum(), [tensors[n] for n in names], materialize_grads=True)
        for f in (ops.layer_norm, reference)
    )
    torch.testing.assert_close(got, wanted)


@DTYPES
@pytest.mark.parametrize("form", ["plain", "drop-path"])
def test_bit_equal_for_any_number_of_threads(form: str, dtype: torch.dtype, level: str) -> None:
    tensors = make((6, 331, 24), FORMS[form], dtype)
    grads_out, found = grads_for(tensors), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(ops.layer_norm, tensors, grads_out))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_addresses(dtype: torch.dtype, level: str) -> None:
    tensors = make((3, 9, 37), FORMS["drop-path"], dtype)
    grads_out = grads_for(tensors)
    expected = run(ops.layer_norm, tensors, grads_out)
    turned = {n: x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for n, x in tensors.items()}
    shifted = {
        n: torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape) for n, x in tensors.items()
    }
    for others in (turned, shifted):
        others = {n: x.requires_grad_(tensors[n].requires_grad) for n, x in others.items()}
        got = run(ops.layer_norm, others, [g.mT.contiguous().mT for g in grads_out])
        assert all(torch.equal(x, expected[name]) for name, x in got.items())


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    got = run(ops.layer_norm, make(shape, FORMS["drop-path"], torch.float32))
    assert got["out0"].shape == got["out1"].shape == got["dx"].shape == got["dresidual"].shape == shape
    assert not got["dweight"].any() and not got["dbias"].any()


def test_nan_stays_in_its_row_and_is_not_lost(level: str) -> None:
    tensors = make((3, 4, 37), FORMS["drop-path"], torch.float32)
    with torch.no_grad():
        tensors["x"][0, 1, 36] = torch.nan  # of a sample that drop path leaves out: zero times NaN
    got = run(ops.layer_norm, tensors)
    assert got["out0"].isnan().nonzero().tolist() == [[0, 1, 36]]
    for name in ("out1", "dx", "dresidual"):
        assert got[name].isnan()[0, 1].all() and got[name].isnan().sum() == 37, name
    assert got["dweight"].isnan().all()


def test_a_row_of_equal_elements_has_no_norm(level: str) -> None:
    assert ops.layer_norm(torch.full((5, 37), 3.3)).abs().max() < 1e-6 * 316
    assert ops.layer_norm(torch.zeros(5, 37), eps=0).isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    tensors = make((2, 3, 4, 8), FORMS[form], torch.float32)
    given_ = [tensors.get(name) for name in ("x", "residual", "residual_scale", "weight", "bias")]
    arguments = (*given_, 1e-5, torch.float32, torch.float32, "cpp")
    torch.library.opcheck(torch.ops.florence_fast.layer_norm.default, arguments)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_opcheck_backward(needs: tuple[bool, ...]) -> None:
    tensors = {n: x.detach() for n, x in make((2, 3, 4, 8), FORMS["drop-path"], torch.float32).items()}
    given_ = [tensors.get(name) for name in ("x", "residual", "residual_scale", "weight", "bias")]
    options = (1e-5, torch.float32, torch.float32, "cpp")
    norm, total, mean, rstd = torch.ops.florence_fast.layer_norm(*given_, *options)
    arguments = (norm, norm, total, *given_[2:], mean, rstd, list(needs), *options)
    torch.library.opcheck(
        torch.ops.florence_fast.layer_norm_backward.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


def test_compiles() -> None:
    tensors = make((2, 5, 8), FORMS["drop-path"], torch.float32)
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    grads_out = grads_for(tensors)
    got, expected = run(compiled, tensors, grads_out), run(ops.layer_norm, tensors, grads_out)
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_what_it_cannot_take() -> None:
    def reasons(x: Tensor, **others: Tensor) -> list[str]:
        return ops.OPS["layer_norm"].unsupported_reasons("cpp", x, **others)

    assert not reasons(torch.ones(2, 8, dtype=torch.bfloat16), residual=torch.ones(2, 8))
    assert reasons(torch.ones(2, 8), weight=torch.ones(8).double()) == [
        "tensors must be float32, bfloat16 or float16, got torch.float64"
    ]
    assert reasons(torch.ones(2, 8, device="meta")) == ["native kernels run on the CPU, not on meta"]
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run layer_norm: tensors must be float32"):
        ops.layer_norm(torch.ones(2, 8).double())
