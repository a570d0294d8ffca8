"""The Triton kernels of patch merging against the float64 definition, through the interpreter on a CPU and on a GPU
where there is one: values, gradients, and what must not depend on luck.

Letters: B batch · H W map height and width · C channels.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels import patch_merging as patch_merging_kernels
from florence_fast.ops.patch_merging import patch_merging, patch_merging_reference
from florence_fast.ops.patch_merging import torch as patch_merging_torch
from tests.ops.rounding import relative_error

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""


@dataclass(frozen=True)
class Case:
    """One way to call the op: the rows of the map have this mean, and deviate by 1."""

    shape: tuple[int, ...]
    mean: float = 0.5
    outlier: float = 0.0
    """What is added to the first channel of every token."""

    def make(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Draw the tensors, which ask for gradients."""
        channels = self.shape[-1]
        x = torch.randn(self.shape) + self.mean
        x[..., 0] += self.outlier
        tensors = {
            "x": x.to(dtype),
            "norm_weight": torch.rand(4 * channels) + 0.5,
            "norm_bias": torch.randn(4 * channels),
            "weight": torch.randn(2 * channels, 4 * channels).mul((4 * channels) ** -0.5).to(dtype),
        }
        return {name: x.to(device).requires_grad_() for name, x in tensors.items()}

    def grad_out(self, dtype: torch.dtype, device: str) -> Tensor:
        *outer, height, width, channels = self.shape
        return torch.randn(*outer, (height + 1) // 2, (width + 1) // 2, 2 * channels).to(device, dtype)


CASES = {
    "even": Case((2, 6, 8, 32)),
    "odd-height": Case((2, 5, 6, 48)),
    "odd-width-columns-128-and-64": Case((1, 6, 7, 96)),
    "odd-both": Case((2, 7, 3, 16)),
    "one-token": Case((1, 1, 1, 32)),
    "more-rows-than-a-block": Case((3, 14, 14, 16)),
    "columns-in-groups": Case((1, 2, 3, 192)),
    "frames": Case((1, 2, 3, 4, 16)),
    "far-from-zero": Case((1, 8, 8, 32), mean=30.0),
    "outlier-in-the-first-channel": Case((1, 8, 8, 32), outlier=1000.0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def interpretable(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")


def plain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    """Merge step by step in the dtype of ``x``, as one would write it in PyTorch."""
    rows = patch_merging_torch.gather(x.flatten(0, -4))
    out = F.linear(F.layer_norm(rows, rows.shape[-1:], norm_weight.to(x), norm_bias.to(x)), weight)
    return out.unflatten(0, x.shape[:-3])


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return patch_merging(**kwargs)


def run(function: Any, tensors: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(**tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, grad_out = case.make(dtype, device), case.grad_out(dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = run(patch_merging_reference, exact_tensors, grad_out.double())
    ours, usual = run(kernels, tensors, grad_out), run(plain, tensors, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == (dtype if name == "out" else tensors[name[1:]].dtype)
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= max(allowed, FLOOR[dtype]), (
            f"patch_merging, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    interpretable(dtype, device)
    check(case, dtype, device)


@given(height=st.integers(1, 7), width=st.integers(1, 7), channels=st.sampled_from([16, 32]), batch=st.integers(1, 2))
def test_any_shape(height: int, width: int, channels: int, batch: int) -> None:
    check(Case((batch, height, width, channels)), torch.float32, "cpu")


@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_far_from_zero(dtype: torch.dtype, mean: float, device: str) -> None:
    """The column sums of the rounded weights and the shifted statistics are there for this."""
    interpretable(dtype, device)
    tensors = Case((1, 8, 8, 96), mean=mean).make(dtype, device)
    exact = patch_merging_reference(**{name: x.double() for name, x in tensors.items()})
    error, usual = relative_error(kernels(**tensors), exact), relative_error(plain(**tensors), exact)
    assert error <= 2 * usual + (2e-6 if dtype == torch.float32 else 0), f"{error:.2e}, plain PyTorch has {usual:.2e}"


def test_chunks_of_the_backward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["odd-height"]
    tensors, grad_out = case.make(torch.float32, device), case.grad_out(torch.float32, device)
    whole = run(kernels, tensors, grad_out)
    monkeypatch.setattr(patch_merging_kernels, "SCRATCH_BYTES", 7 * 2 * 4 * 48 * 4)  # seven rows at a time
    torch.testing.assert_close(run(kernels, tensors, grad_out), whole)


def test_columns_in_any_number_of_groups(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Case((1, 2, 4, 96)).make(torch.float32, device)
    outs = []
    for groups in (1, 2, 3):
        monkeypatch.setattr(patch_merging_kernels, "_column_groups", lambda *_, groups=groups: groups)
        outs.append(kernels(**tensors))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("row_blocks", "column_blocks", "groups"),
    [(784, 2, 1), (784, 3, 1), (49, 4, 2), (1, 4, 4), (132, 4, 1), (33, 4, 4), (5, 1, 1)],
)
def test_few_rows_are_spread_by_their_columns(row_blocks: int, column_blocks: int, groups: int) -> None:
    assert patch_merging_kernels._column_groups(row_blocks, column_blocks, 132) == groups


def test_every_subset_of_gradients(device: str) -> None:
    case = CASES["odd-both"]
    tensors, grad_out = case.make(torch.float32, device), case.grad_out(torch.float32, device)
    everything = run(kernels, tensors, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


def test_gradients_are_bit_equal_over_runs(device: str) -> None:
    case = CASES["more-rows-than-a-block"]
    tensors, grad_out = case.make(torch.float16, device), case.grad_out(torch.float16, device)
    first, *others = (run(kernels, tensors, grad_out) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_strides(device: str) -> None:
    case = CASES["odd-height"]
    tensors, grad_out = case.make(torch.float32, device), case.grad_out(torch.float32, device)
    expected = run(kernels, tensors, grad_out)
    turned = {n: (x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach()) for n, x in tensors.items()}
    got = run(kernels, {n: x.requires_grad_() for n, x in turned.items()}, grad_out.mT.contiguous().mT)
    assert not turned["x"].is_contiguous() and not turned["weight"].is_contiguous()
    assert all(torch.equal(x, expected[name]) and x.is_contiguous() for name, x in got.items())


@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (0, 2, 3, 4, 16)], ids=str)
def test_empty_batch(shape: tuple[int, ...], device: str) -> None:
    case = Case(shape)
    got = run(kernels, case.make(torch.float32, device), case.grad_out(torch.float32, device))
    assert got["out"].shape == (*shape[:-3], 2, 2, 32) and got["dx"].shape == shape
    assert not any(got[name].any() for name in ("dnorm_weight", "dnorm_bias", "dweight"))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("channel", [0, 5])
def test_nan_stays_in_its_row_and_is_not_lost(channel: int, device: str) -> None:
    case = CASES["odd-height"]
    tensors, grad_out = case.make(torch.float32, device), case.grad_out(torch.float32, device)
    with torch.no_grad():
        tensors["x"][0, 4, 3, channel] = math.nan
    ours, exact = (run(f, tensors, grad_out) for f in (kernels, patch_merging_reference))
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


def test_nothing_is_kept_and_inference_equals_training(device: str) -> None:
    tensors = CASES["odd-width-columns-128-and-64"].make(torch.float16, device)
    trained = kernels(**tensors)
    with torch.no_grad():
        assert torch.equal(kernels(**tensors), trained)
    saved = [x for x in trained.grad_fn.saved_tensors if all(x is not y for y in tensors.values())]
    assert sum(x.numel() for x in saved) == 0


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool, device: str) -> None:
    tensors = CASES["odd-height"].make(torch.float16, device)
    arguments = (*(x.requires_grad_(train) for x in tensors.values()), 1e-5, "triton")
    torch.library.opcheck(torch.ops.florence_fast.patch_merging.default, arguments)


def test_compiles_in_full(device: str) -> None:
    case = CASES["odd-height"]
    tensors, grad_out = case.make(torch.float32, device), case.grad_out(torch.float32, device)
    with ops.backend("triton"):
        backend = "inductor" if device == "cuda" else "aot_eager"
        got = run(torch.compile(patch_merging, fullgraph=True, backend=backend), tensors, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in run(kernels, tensors, grad_out).items())


REFUSED = [
    (Case((1, 2, 2, 24)), torch.float32, "C must be a multiple of 16 and at most 2048 for the kernels, got 24"),
    (Case((1, 2, 2, 2064)), torch.float32, "for the kernels, got 2064"),
    (Case((1, 2, 2, 16)), torch.float64, "tensors must be float16, bfloat16 or float32, got torch.float64"),
    (Case((1, 2, 2, 16)), torch.bfloat16, "multiplies the bits of bfloat16"),
]


@pytest.mark.parametrize(("case", "dtype", "reason"), REFUSED, ids=[reason[:40] for *_, reason in REFUSED])
def test_what_it_cannot_do_it_refuses_with_the_reason(case: Case, dtype: torch.dtype, reason: str) -> None:
    tensors = {name: x.detach() for name, x in replace(case).make(dtype, "cpu").items()}
    with pytest.raises(RuntimeError, match=reason):
        kernels(**tensors)
    assert patch_merging(**tensors).isfinite().all()
