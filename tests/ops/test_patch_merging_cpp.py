"""The native kernels of patch merging against the float64 definition, at every level that runs here: values, gradients,
odd sizes, chunks, and what must not depend on threads, strides or luck.

Letters: B batch · H W map height and width · C channels.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from florence_fast.ops.patch_merging import cpp as patch_merging_cpp
from florence_fast.ops.patch_merging import patch_merging, patch_merging_reference
from tests.ops.test_patch_merging import NAMES, SHAPES, make, merged_like, plain, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FLOOR = 1e-6
"""Relative errors below this are float32's rounding in whatever order, and are not compared."""

WIDE = {"swin-tiny": (2, 8, 6, 96), "ragged-channels": (2, 5, 7, 37), "odd-both-wide": (1, 7, 3, 200)}
shapes = pytest.mark.parametrize("shape", (SHAPES | WIDE).values(), ids=(SHAPES | WIDE).keys())


def check(shape: tuple[int, ...], dtype: torch.dtype, mean: float, what: object) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors = make(shape, dtype, mean)
    grad_out = merged_like(tensors[0])
    exact = run(
        patch_merging_reference, tuple(x.detach().double().requires_grad_() for x in tensors), grad_out.double()
    )
    # One step in the dtype of x is the whole batch at once: 16-bit sums over it are rounded once.
    frames = (lambda x, *rest: plain(x.flatten(0, -4), *rest).unflatten(0, x.shape[:-3])) if len(shape) == 5 else plain
    ours, usual = run(patch_merging, tensors, grad_out), run(frames, tensors, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == (dtype if name == "out" else tensors[NAMES.index(name[1:])].dtype), name
        error, allowed = (((y[name].double() - x).norm() / x.norm().clamp_min(1e-30)).item() for y in (ours, usual))
        factor = 2 if name == "out" else 3
        assert error <= max(factor * allowed, FLOOR), (
            f"patch_merging, {name}, {dtype}, {shape}, {what}: {error:.2e}, plain PyTorch has {allowed:.2e}"
        )


@DTYPES
@shapes
def test_as_exact_as_plain_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, level: str, poisoned_memory: None
) -> None:
    check(shape, dtype, 0.5, level)


@DTYPES
def test_a_mean_far_beyond_the_spread(dtype: torch.dtype, level: str) -> None:
    check((2, 6, 8, 24), dtype, 30.0, level)


@given(
    size=st.tuples(*[st.integers(1, 9)] * 3),
    channels=st.integers(2, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(size: tuple[int, int, int], channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    check((*size, channels), dtype, 0.5, "random")


def test_rows_of_the_kernel_are_those_of_the_library(level: str) -> None:
    """The product left out: its weight picks single channels."""
    x, norm_weight, norm_bias, _ = make((2, 5, 7, 20), torch.float32)
    picked = torch.eye(80)[torch.randperm(80)[:40]]
    torch.testing.assert_close(
        patch_merging(x, norm_weight, norm_bias, picked), plain(x, norm_weight, norm_bias, picked), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 5000], ids=["row-by-row", "ragged"])
def test_chunks_change_nothing(chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make((3, 5, 7, 24), dtype)
    grad_out = merged_like(tensors[0])
    whole = run(patch_merging, tensors, grad_out)
    monkeypatch.setattr(patch_merging_cpp, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(patch_merging_cpp, "BACKWARD_CHUNK_BYTES", chunk)
    for name, x in run(patch_merging, tensors, grad_out).items():
        assert (x - whole[name]).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * whole[name].norm(), name


def test_every_subset_of_gradients() -> None:
    tensors = make((2, 3, 4, 17), torch.float32)
    grad_out = merged_like(tensors[0])
    everything = run(patch_merging, tensors, grad_out)
    for subset in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(1, 4)):
        some = [x.detach().requires_grad_(i in subset) for i, x in enumerate(tensors)]
        grads = torch.autograd.grad(patch_merging(*some), [some[i] for i in subset], grad_out)
        for i, grad in zip(subset, grads, strict=True):
            assert torch.equal(grad, everything[f"d{NAMES[i]}"]), f"{NAMES[i]} when only {subset} are asked for"


@DTYPES
def test_kernels_are_bit_equal_for_any_number_of_threads(dtype: torch.dtype, level: str) -> None:
    """The kernels' own part: what torch's products do to the order of their sums is torch's matter."""
    x, norm_weight, norm_bias, _ = make((3, 41, 43, 16), dtype)
    rows = patch_merging_cpp._Rows(x, 1 << 30)
    grad, found = torch.randn(rows.count, 64).to(dtype), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norm = rows.normalise(x, 0, rows.count, norm_weight, norm_bias, 1e-5).clone()
        dx, d_norm = torch.empty_like(x), torch.empty(2, 64)
        rows.backward(grad, x, 0, rows.count, norm_weight, dx, d_norm)
        found.append((norm, dx, d_norm))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_addresses(dtype: torch.dtype, level: str) -> None:
    tensors = make((2, 5, 4, 19), dtype)
    grad_out = merged_like(tensors[0])
    expected = run(patch_merging, tensors, grad_out)
    plain_ones = [x.detach() for x in tensors]
    turned = [x.mT.contiguous().mT if x.ndim > 1 else x for x in plain_ones]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in plain_ones]
    before = [x.clone() for x in (*turned, *shifted)]
    for others in (turned, shifted):
        inputs = tuple(x.detach().requires_grad_() for x in others)
        got = run(patch_merging, inputs, grad_out.mT.contiguous().mT)
        assert all(x.is_contiguous() for x in got.values())
        torch.testing.assert_close(got, expected)
    assert all(map(torch.equal, (*turned, *shifted), before))


@pytest.mark.parametrize("shape", [(0, 3, 4, 3), (0, 2, 3, 4, 3), (2, 1, 3, 4, 3)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    tensors = make(shape, torch.float32)
    got = run(patch_merging, tensors, merged_like(tensors[0]))
    assert got["out"].shape == (*shape[:-3], 2, 2, 6) and got["dx"].shape == shape
    if shape[0] == 0:
        assert not any(got[f"d{name}"].any() for name in NAMES[1:])


def test_nan_stays_in_its_row(level: str) -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    with torch.no_grad():
        tensors[0][1, 4, 2, 1] = math.nan
    out = patch_merging(*tensors)
    assert out[1, 2, 1].isnan().all() and out.isnan().sum() == 6


def test_autocast_casts_x_alone() -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    expected = patch_merging(tensors[0].bfloat16(), *tensors[1:])
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_merging(*tensors)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool) -> None:
    tensors = tuple(x.detach().requires_grad_(train) for x in make((2, 3, 4, 3), torch.float32))
    torch.library.opcheck(torch.ops.florence_fast.patch_merging.default, (*tensors, 1e-5, "cpp"))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True], [True, False, False, False]], ids=str)
def test_opcheck_backward(needs: list[bool]) -> None:
    tensors = tuple(x.detach() for x in make((2, 3, 4, 3), torch.float32))
    backward = torch.ops.florence_fast.patch_merging_backward.default
    torch.library.opcheck(backward, (merged_like(tensors[0]), *tensors, needs, 1e-5, "cpp"))


def test_compiles() -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    grad_out = merged_like(tensors[0])
    compiled = torch.compile(patch_merging, fullgraph=True, backend="aot_eager")
    got, expected = run(compiled, tensors, grad_out), run(patch_merging, tensors, grad_out)
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_what_it_cannot_take() -> None:
    def reasons(*tensors: Tensor) -> list[str]:
        return ops.OPS["patch_merging"].unsupported_reasons("cpp", *tensors)

    assert not reasons(*make((2, 5, 4, 3), torch.bfloat16))
    assert reasons(*make((2, 5, 4, 3))) == ["tensors must be float32, bfloat16 or float16, got torch.float64"]
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run patch_merging: tensors must be float32"):
        patch_merging(*make((2, 5, 4, 3)))
