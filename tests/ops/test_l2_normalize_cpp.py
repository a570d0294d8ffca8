"""The native kernels of l2_normalize against the library in float64, at every level that runs here."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from tests.ops.test_l2_normalize import by_library, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = {"tiny": (64, 512), "ragged": (3, 5, 37), "one-element": (7, 1), "one-row": (48,), "long": (2, 5000)}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def check(x: Tensor, grad_out: Tensor, eps: float = 1e-12) -> None:
    exact = run(by_library, x.detach().double().requires_grad_(), grad_out.double(), eps=eps)
    ours, usual = run(ops.l2_normalize, x, grad_out, eps=eps), run(by_library, x, grad_out, eps=eps)
    for factor, y, plain, wanted in zip((2, 3), ours, usual, exact, strict=True):
        assert y.dtype == x.dtype
        error, allowed = ((z.double() - wanted).norm() for z in (y, plain))
        # A gradient along its row cancels; what rounding leaves is of the size of the terms.
        terms = (grad_out.double() / x.detach().double().norm(dim=-1, keepdim=True).clamp_min(eps)).norm()
        floor = 1e-6 * (wanted.norm() + (terms if y is ours[1] else 0))
        assert error <= max(factor * allowed, floor), (x.shape, x.dtype, error, allowed)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_as_exact_as_the_library(shape: tuple[int, ...], dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(*draw(shape, dtype))


def test_rows_shorter_than_eps_are_divided_by_a_constant(level: str) -> None:
    x, grad_out = draw((40, 16), torch.float32)
    check(x, grad_out, eps=4.0)
    zeros = torch.zeros(2, 19, requires_grad=True)
    out, dx = run(ops.l2_normalize, zeros, torch.ones(2, 19), eps=0.5)
    assert not out.any() and (dx == 2).all()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    check(*draw((rows, columns), dtype))


@DTYPES
def test_bit_equal_for_any_number_of_threads_strides_and_addresses(dtype: torch.dtype, level: str) -> None:
    x, grad_out = draw((900, 37), dtype)
    expected, plain = run(ops.l2_normalize, x, grad_out), x.detach()
    turned, shifted = plain.T.contiguous().T, torch.cat([plain.flatten()[:1], plain.flatten()])[1:].view(x.shape)
    for threads, other in itertools.product((1, 2, 3), (plain, turned, shifted)):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(ops.l2_normalize, other.requires_grad_(), grad_out), expected))


def test_nan_stays_in_its_row_and_is_not_lost(level: str) -> None:
    x, grad_out = draw((3, 19), torch.float32)
    with torch.no_grad():
        x[1, 18] = torch.nan
    for y in run(ops.l2_normalize, x, grad_out):
        assert y.isnan().all(1).tolist() == [False, True, False] and y.isnan().sum() == 19


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    out, dx = run(ops.l2_normalize, *draw(shape, torch.float32))
    assert out.shape == dx.shape == shape


def test_opcheck_and_compile() -> None:
    x, grad_out = draw((3, 8), torch.float32)
    torch.library.opcheck(torch.ops.florence_fast.l2_normalize.default, (x, 1e-12, torch.float32, "cpp"))
    compiled = torch.compile(ops.l2_normalize, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, x, grad_out), run(ops.l2_normalize, x, grad_out)))


def test_what_it_cannot_take() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run l2_normalize: tensors must be float32"):
        ops.l2_normalize(torch.ones(2, 8).double())
