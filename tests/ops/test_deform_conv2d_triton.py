"""The Triton kernels of deformable convolution against the float64 definition, through the interpreter on a CPU and on
a GPU where there is one: values, gradients, and what must not depend on luck.

Letters: B batch · H W map height and width · C channels · G offset groups · K taps, kh times kw.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.ops import dispatch
from florence_fast.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference
from tests.ops.rounding import assert_as_exact, relative_error
from tests.ops.test_deform_conv2d import Case, grad_like, plainly, run

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""

CASES = {
    "three-by-three": Case(),
    "groups-strides-dilations": Case((9, 8), 6, 4, (3, 2), 2, 3, (2, 1), (1, 2), (1, 2), batch=1),
    "one-tap-no-mask-no-bias": Case(kernel=(1, 1), padding=(0, 0), mask=False, bias=False),
    "far-off-the-map": Case((3, 4), reach=20.0),
    "near-the-grid": Case((5, 7), reach=0.02, stride=(1, 1), kernel=(3, 3), dilation=(1, 1), padding=(1, 1)),
    "two-parts-of-the-channels": Case((3, 4), channels=160, batch=1),
    "three-parts-of-the-channels": Case((2, 3), channels=272, kernel=(1, 2), padding=(0, 1), batch=1),
    "channels-of-two-groups": Case((4, 3), channels=96, offset_groups=2, batch=1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return deform_conv2d(**kwargs)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, values = case.make(dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    grad_out = grad_like(case, tensors)
    exact = run(deform_conv2d_reference, exact_tensors, values, grad_out.double())
    ours, usual = run(kernels, tensors, values, grad_out), run(plainly, tensors, values, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == dtype and ours[name].shape == x.shape
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= max(allowed, FLOOR[dtype]), (
            f"deform_conv2d, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter cuts bfloat16 where a GPU rounds")
    check(case, dtype, device)


def test_every_sample_on_one_pixel(device: str) -> None:
    """One pixel gathers all samples: more than a program reads at a time."""
    tensors, values = replace(Case((6, 6)), batch=1).make(torch.float32, device)
    grid = torch.arange(6.0, device=device)
    with torch.no_grad():
        tap = torch.arange(3.0, device=device) - 1
        offset = tensors["offset"].view(3, 3, 2, 6, 6)
        offset[:, :, 0] = 2.25 - grid[:, None] - tap[:, None, None, None]
        offset[:, :, 1] = 3.5 - grid - tap[None, :, None, None]
    grad_out = torch.randn(1, 6, 6, 6, device=device)
    ours, usual = (run(f, tensors, values, grad_out) for f in (kernels, deform_conv2d_reference))
    in_f64 = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = run(deform_conv2d_reference, in_f64, values, grad_out.double())
    for name, x in exact.items():
        assert_as_exact(ours[name], usual[name], x, name)
    assert ours["dinput"].count_nonzero() == 4 * 4


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 2),
    offset_groups=st.integers(1, 2),
    mask=st.booleans(),
    reach=st.sampled_from([0.5, 5.0]),
)
def test_any_shape(size: Any, kernel: Any, stride: Any, dilation: Any, mask: bool, reach: float, **groups: int) -> None:
    padding = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    case = Case(size, 4, 2, kernel, **groups, stride=stride, padding=padding, dilation=dilation, mask=mask, reach=reach)
    check(replace(case, batch=1), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["three-by-three", "one-tap-no-mask-no-bias"])
def test_every_subset_of_gradients(name: str, device: str) -> None:
    case = replace(CASES[name], size=(3, 2), kernel=(1, 2), batch=1)
    tensors, values = case.make(torch.float32, device)
    grad_out = grad_like(case, tensors)
    everything = run(kernels, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some, **values), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


@pytest.mark.parametrize("name", ["three-by-three", "near-the-grid"])
def test_gradients_are_bit_equal_over_runs(name: str, device: str) -> None:
    case = replace(CASES[name], size=(4, 5), batch=1)
    tensors, values = case.make(torch.float16, device)
    grad_out = grad_like(case, tensors)
    first, *others = (run(kernels, tensors, values, grad_out) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_strides_and_dtypes_of_places(device: str) -> None:
    case = CASES["three-by-three"]
    tensors, values = case.make(torch.float16, device)
    grad_out = grad_like(case, tensors)
    expected = run(kernels, tensors, values, grad_out)
    turned = {n: x.detach().to(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in tensors.items()}
    turned = {n: x.detach().float() if n in ("offset", "mask") else x.detach() for n, x in turned.items()}
    found = run(kernels, {n: x.requires_grad_() for n, x in turned.items()}, values, grad_out)
    assert found["doffset"].dtype == found["dmask"].dtype == torch.float32
    assert all(torch.equal(found[name].to(x.dtype), x) for name, x in expected.items())


def test_empty_batch(device: str) -> None:
    tensors, values = replace(Case(), batch=0).make(torch.float32, device)
    found = run(kernels, tensors, values, torch.zeros(0, 6, 5, 7, device=device))
    assert found["out"].shape == (0, 6, 5, 7) and found["dinput"].shape == (0, 4, 5, 7)
    assert not found["dweight"].any() and not found["dbias"].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_nan_is_not_lost_and_reaches_nothing_else(name: str, value: float, device: str) -> None:
    case = replace(CASES["three-by-three"], batch=1)
    tensors, values = case.make(torch.float32, device)
    with torch.no_grad():
        tensors[name][0, 1, 0, 0] = value
    grad_out = grad_like(case, tensors)
    ours, exact = run(kernels, tensors, values, grad_out), run(deform_conv2d_reference, tensors, values, grad_out)
    for key in ("out", "dinput", "dweight", "dbias"):
        assert torch.equal(ours[key].isfinite(), exact[key].isfinite()), key
    assert ours["out"].isnan().any() or math.isinf(value)


@pytest.mark.parametrize("name", ["three-by-three", "one-tap-no-mask-no-bias"])
def test_opcheck(name: str, device: str) -> None:
    case = replace(CASES[name], size=(3, 3), batch=2)
    tensors, _ = case.make(torch.float32, device)
    arguments = [tensors.get(n) for n in ("input", "offset", "mask", "weight", "bias")]
    values = (*map(list, (case.stride, case.padding, case.dilation)), "triton")
    torch.library.opcheck(torch.ops.florence_fast.deform_conv2d.default, (*arguments, *values))


def test_compiles_in_full(device: str) -> None:
    case = CASES["three-by-three"]
    tensors, values = case.make(torch.float32, device)
    grad_out = grad_like(case, tensors)
    with ops.backend("triton"):
        compiled = torch.compile(deform_conv2d, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        found = run(compiled, tensors, values, grad_out)
    assert all(torch.equal(x, found[name]) for name, x in run(kernels, tensors, values, grad_out).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_that_the_interpreter_cannot_do(dtype: torch.dtype) -> None:
    tensors, values = Case().make(dtype)
    with pytest.raises(RuntimeError, match="float"):
        kernels(**tensors, **values)
    assert dispatch.choose("deform_conv2d", **tensors, **values) != "triton"
