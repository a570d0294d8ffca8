"""What l2_normalize computes and promises: the definition against torch.nn.functional in float64 and by finite
differences, the ``torch`` backend against the definition, and torch.library's contract, compile, export and autocast.
"""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from florence_fast import ops

FORWARD = torch.ops.florence_fast.l2_normalize.default
BACKWARD = torch.ops.florence_fast.l2_normalize_backward.default

SHAPES = {"features": (6, 8), "map": (2, 3, 4, 5), "one-number-a-row": (4, 1), "one-row": (9,)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
backends = pytest.mark.parametrize("backend", ["torch", "reference"])


def run(function: Any, x: Tensor, grad_out: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Give the result and the gradient of x."""
    out = function(x, **options)
    return out.detach(), torch.autograd.grad(out, x, grad_out.to(out.dtype))[0]


def by_library(x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.normalize(x, dim=-1, eps=eps)


@backends
@pytest.mark.parametrize("eps", [1e-12, 2.0], ids=["eps-below-all", "eps-between"])
@shapes
def test_equals_the_library_in_float64(shape: tuple, eps: float, backend: str, poisoned_memory: None) -> None:
    x, grad_out = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    with ops.backend(backend):
        got = run(ops.l2_normalize, x, grad_out, eps=eps)
    for ours, exact in zip(got, run(by_library, x, grad_out, eps=eps), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def test_reference_by_finite_differences() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.l2_normalize_reference, [x])
    assert torch.autograd.gradcheck(lambda x: ops.l2_normalize_reference(x, eps=10.0), [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_backend_is_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    x, grad_out = torch.randn(64, 96).to(dtype).requires_grad_(), torch.randn(64, 96).to(dtype)
    exact = run(by_library, x.detach().double().requires_grad_(), grad_out.double())
    with ops.backend("torch"):
        ours, usual = run(ops.l2_normalize, x, grad_out), run(by_library, x, grad_out)
    for factor, y, plain, wanted in zip((2, 3), ours, usual, exact, strict=True):
        assert y.dtype == dtype
        assert (y.double() - wanted).norm() <= max(factor * (plain.double() - wanted).norm(), 1e-6 * wanted.norm())


@backends
def test_zeros_stay_zeros_and_have_the_gradient_of_a_constant_factor(backend: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
        with ops.backend(backend):
            out, dx = run(ops.l2_normalize, x, torch.ones(2, 8), eps=0.5)
        assert torch.equal(out, torch.zeros_like(x)) and torch.equal(dx, torch.full_like(x, 2.0))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, train: bool) -> None:
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=train)
    torch.library.opcheck(FORWARD, (x, 1e-12, dtype, "torch"))


def test_opcheck_backward() -> None:
    x = torch.randn(2, 3, 8)
    _, length = FORWARD(x, 1e-12, torch.float32, "torch")
    torch.library.opcheck(BACKWARD, (torch.randn(2, 3, 8), x, length, 1e-12, torch.float32, "torch"))


def test_compiles_once_for_every_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.l2_normalize, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(2, 8, requires_grad=True))
    at_first = counter.frame_count  # 2: torch tries eps as a symbol before it takes it for a constant
    for rows in (2, 3, 17):
        x, grad_out = torch.randn(rows, 8, requires_grad=True), torch.randn(rows, 8)
        got, expected = run(compiled, x, grad_out), run(ops.l2_normalize, x, grad_out)
        assert all(map(torch.equal, got, expected)), rows
        assert counter.frame_count == at_first, f"compiled again for {rows} rows"


def test_inductor() -> None:
    x, grad_out = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    torch.testing.assert_close(
        run(torch.compile(ops.l2_normalize, fullgraph=True), x, grad_out), run(ops.l2_normalize, x, grad_out)
    )


class Normalize(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.l2_normalize(x)


def test_export_with_dynamic_sizes() -> None:
    dims = ({0: Dim("batch", min=2)},)
    exported = torch.export.export(Normalize(), (torch.randn(3, 8),), dynamic_shapes=dims).module()
    x = torch.randn(7, 8)
    assert torch.equal(exported(x), ops.l2_normalize(x))


def test_meta_device() -> None:
    x = torch.randn(3, 8, device="meta", requires_grad=True)
    out, dx = run(ops.l2_normalize, x, torch.randn(3, 8, device="meta"))
    assert out.shape == dx.shape == (3, 8) and out.device.type == "meta"


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_on_a_cpu_gives_what_the_library_gives(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(3, 8, dtype=dtype)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert ops.l2_normalize(x).dtype == by_library(x).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_on_cuda_gives_what_the_library_gives(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert ops.l2_normalize(x).dtype == by_library(x).dtype


@backends
def test_a_result_of_another_dtype(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's autocast asks for, on a CPU: 16-bit in, float32 out."""
    monkeypatch.setattr(ops.dispatch, "float32_autocast_dtype", lambda *_: torch.float32)
    x, grad_out = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(3, 8)
    with ops.backend(backend):
        out, dx = run(ops.l2_normalize, x, grad_out)
    assert (out.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(out, by_library(x.detach().float()))


@backends
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    with ops.backend(backend):
        out, dx = run(ops.l2_normalize, torch.randn(shape, requires_grad=True), torch.randn(shape))
    assert out.shape == dx.shape == shape


def test_any_strides_and_the_input_is_left_alone() -> None:
    x, grad_out = torch.randn(5, 8), torch.randn(8, 5).T
    turned = x.T.contiguous().T.requires_grad_()
    got = run(ops.l2_normalize, turned, grad_out)
    expected = run(ops.l2_normalize, x.clone().requires_grad_(), grad_out.contiguous())
    assert not turned.is_contiguous() and all(map(torch.equal, got, expected)) and got[0].is_contiguous()
    assert torch.equal(turned, x)


@backends
def test_nan_stays_in_its_row_and_is_not_lost(backend: str) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    with ops.backend(backend):
        for y in run(ops.l2_normalize, x.requires_grad_(), torch.randn(3, 8)):
            assert y.isnan().all(1).tolist() == [False, True, False] and y.isnan().sum() == 8


def test_second_derivatives_are_those_of_the_reference() -> None:
    x = torch.randn(3, 8, requires_grad=True)

    def second_derivative() -> Tensor:
        (grad,) = torch.autograd.grad(ops.l2_normalize(x)[:, 0].sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


BAD = [
    ([1.0], {}, TypeError, "x must be a floating-point tensor, got list"),
    (torch.ones(2, 8).int(), {}, TypeError, "x must be a floating-point tensor, got torch.int32"),
    (torch.tensor(1.0), {}, ValueError, "x must have shape (..., D) with D at least 1, got ()"),
    (torch.ones(2, 0), {}, ValueError, "x must have shape (..., D) with D at least 1, got (2, 0)"),
    (torch.ones(2, 8), {"eps": -1.0}, ValueError, "eps must be a number of at least 0, got -1.0"),
]


@pytest.mark.parametrize(("x", "options", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(x: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.l2_normalize(x, **options)
