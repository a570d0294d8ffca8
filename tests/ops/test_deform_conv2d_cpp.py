"""The native samples of deformable convolution against the float64 definition, at every level that runs here.

Letters: B batch · H W map height and width · C channels · G offset groups
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native
from florence_fast.ops.deform_conv2d import cpp as deform_conv2d_cpp
from florence_fast.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference
from tests.ops.rounding import relative_error
from tests.ops.test_deform_conv2d import BACKWARD, CASES, FORWARD, Case, grad_like, plainly, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MORE = CASES | {
    "whole-vectors": Case(channels=64, out_channels=8),
    "ragged-vectors": Case((6, 5), channels=74, out_channels=4, groups=2, offset_groups=2),
    "many-places": Case((19, 23), channels=8, stride=(1, 2)),
}


def check(case: Case, dtype: torch.dtype) -> None:
    tensors, values = case.make(dtype)
    # What has no bits to lose is not the matter here: positions stay in float32.
    wide = {n: x.detach().float().requires_grad_() if n in ("offset", "mask") else x for n, x in tensors.items()}
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in wide.items()}
    grad_out = grad_like(case, tensors)
    exact = run(deform_conv2d_reference, exact_tensors, values, grad_out)
    ours, usual = (run(f, wide, values, grad_out) for f in (deform_conv2d, plainly))
    for name, x in exact.items():
        allowed = (2 if name == "out" else 3) * relative_error(usual[name], x)
        floor = 1e-6 if dtype == torch.float32 else 0.0
        assert relative_error(ours[name], x) <= max(allowed, floor), (name, dtype, case, relative_error(ours[name], x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(case, dtype)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    depth=st.integers(1, 20),
    groups=st.integers(1, 3),
    reach=st.sampled_from([0.5, 3.0, 1e9]),
    mask=st.booleans(),
)
def test_any_size(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    depth: int,
    groups: int,
    reach: float,
    mask: bool,
) -> None:
    torch.manual_seed(depth)
    channels = depth * groups
    check(Case(size, channels, 3, kernel, 1, groups, stride, (1, 1), (1, 1), mask, reach=reach), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_offset_and_mask_of_another_dtype(dtype: torch.dtype) -> None:
    tensors, values = CASES["three-by-three"].make(torch.float32)
    other = {n: x.detach().to(dtype).requires_grad_() if n in ("offset", "mask") else x for n, x in tensors.items()}
    same = {name: x.detach().float().requires_grad_() for name, x in other.items()}
    grad_out = torch.randn(2, 6, 5, 7)
    found, expected = run(deform_conv2d, other, values, grad_out), run(deform_conv2d, same, values, grad_out)
    assert found["doffset"].dtype == found["dmask"].dtype == dtype
    assert all(torch.equal(x.to(found[name].dtype), found[name]) for name, x in expected.items())


@pytest.mark.parametrize("name", ["input", "offset", "mask", "weight"])
def test_nan_is_not_lost_and_reaches_nothing_else(name: str, level: str) -> None:
    tensors, values = Case().make(torch.float32)
    with torch.no_grad():
        tensors[name][0, 1, 0, 0] = math.nan
    grad_out = torch.randn(2, 6, 5, 7)
    ours, exact = run(deform_conv2d, tensors, values, grad_out), run(deform_conv2d_reference, tensors, values, grad_out)
    for key in ("out", "dinput", "dweight", "dbias", "dmask"):
        assert torch.equal(ours[key].isnan(), exact[key].isnan()), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_subset_of_gradients_is_that_of_all(dtype: torch.dtype) -> None:
    case = CASES["three-by-three"]
    tensors, values = case.make(dtype)
    grad_out = grad_like(case, tensors)
    everything = run(deform_conv2d, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {name: x.detach().requires_grad_(name in subset) for name, x in tensors.items()}
            grads = torch.autograd.grad(deform_conv2d(**some, **values), [some[name] for name in subset], grad_out)
            for name, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{name}"]), (name, subset)


def samples(num_threads: int, x: Tensor, offset: Tensor, mask: Tensor) -> list[Tensor]:
    torch.set_num_threads(num_threads)
    geometry = [3, 3], [1, 1], [1, 1], [1, 1]
    columns = deform_conv2d_cpp.sample(x, offset, mask, *geometry)
    grads = deform_conv2d_cpp.sample_gradients(columns, x, offset, mask, *geometry, True)
    return [columns, *grads, deform_conv2d_cpp.input_gradient(columns, x.shape[1:3], offset, mask, *geometry)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_for_any_number_of_threads(dtype: torch.dtype, level: str) -> None:
    x, offset, mask = torch.randn(2, 21, 19, 80).to(dtype), torch.randn(2, 36, 21, 19) * 9, torch.rand(2, 18, 21, 19)
    one, two = samples(1, x, offset, mask), samples(2, x, offset, mask)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bit_equal_for_any_strides() -> None:
    tensors, values = Case().make(torch.float32)
    grad_out = torch.randn(2, 6, 5, 7)
    expected = run(deform_conv2d, tensors, values, grad_out)
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim == 4 else x for n, x in tensors.items()}
    moved = {
        name: torch.cat([torch.zeros(1), x.detach().flatten()])[1:].view_as(x).requires_grad_()
        for name, x in tensors.items()
    }
    for inputs in (turned, moved):
        found = run(deform_conv2d, inputs, values, grad_out)
        assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_empty_batch() -> None:
    tensors, values = replace(Case(), batch=0).make(torch.float32)
    found = run(deform_conv2d, tensors, values, torch.zeros(0, 6, 5, 7))
    assert found["out"].shape == (0, 6, 5, 7) and found["doffset"].shape == (0, 18, 5, 7)
    assert not found["dweight"].any() and not found["dbias"].any()


def test_autocast_leaves_positions_alone() -> None:
    tensors, values = Case().make(torch.float32)
    low = {name: x.bfloat16() if name in ("input", "weight", "bias") else x for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = deform_conv2d(**tensors, **values)
    assert torch.equal(out, deform_conv2d(**low, **values))


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool) -> None:
    case = CASES["three-by-three"]
    tensors, _ = case.make(torch.float32)
    arguments = [tensors[n].detach().requires_grad_(train) for n in ("input", "offset", "mask", "weight", "bias")]
    geometry = [list(x) for x in (case.stride, case.padding, case.dilation)]
    torch.library.opcheck(FORWARD, (*arguments, *geometry, "cpp"))
    if not train:
        arguments = (torch.randn(2, 6, 5, 7), *arguments, [True] * 5, *geometry, "cpp")
        torch.library.opcheck(BACKWARD, arguments)


def test_compiles_in_full() -> None:
    tensors, values = Case().make(torch.float32)
    grad_out = torch.randn(2, 6, 5, 7)
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    found, expected = (run(f, tensors, values, grad_out) for f in (compiled, deform_conv2d))
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_float64_is_refused_with_the_reason() -> None:
    tensors, values = Case().make(torch.float64)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        deform_conv2d(**tensors, **values)
