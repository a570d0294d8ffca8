"""The Triton kernels of l2_normalize against the float64 definition, through the interpreter on a CPU and on a GPU
where there is one: values, gradients, and what must not depend on luck.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops

SHAPES = {
    "embeddings": (40, 512),
    "exact-blocks": (2, 64, 64),
    "ragged": (3, 11, 37),
    "one-number-a-row": (130, 1),
    "longer-than-a-block": (3, 5000),
    "longest": (2, 8192),
    "one-row": (200,),
}
FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""


def kernels(x: Tensor, **options: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.l2_normalize(x, **options)


def plainly(x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.normalize(x, dim=-1, eps=eps)


def run(function: Any, x: Tensor, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    """Give the result and the gradient of x."""
    out = function(x, **options)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, grad_out.to(out.dtype))[0]}


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, eps: float = 1e-12) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    grad_out = torch.randn(shape, device=device).to(dtype)
    exact = run(ops.l2_normalize_reference, x.detach().double().requires_grad_(), grad_out.double(), eps=eps)
    ours, usual = run(kernels, x, grad_out, eps=eps), run(plainly, x, grad_out, eps=eps)
    for name, wanted in exact.items():
        error, plain = ((y[name].double() - wanted).norm().item() for y in (ours, usual))
        allowed = max((2 if name == "out" else 3) * plain, FLOOR[dtype] * wanted.norm().item())
        worst = (ours[name].double() - wanted).abs().argmax().item()
        got = ours[name].flatten()[worst].item()
        assert ours[name].dtype == dtype
        # A row of one number has the length of that number: its gradient is zero, or rounding.
        assert error <= allowed or (shape[-1] == 1 and error < 1e-2), (
            f"l2_normalize, {name}, {dtype}, {shape}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted.flatten()[worst].item()}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_as_exact_as_plain_pytorch(shape: tuple, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter cuts values off where they become bfloat16")
    check(shape, dtype, device)


@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=2), length=st.integers(2, 300), eps=st.floats(0.01, 20))
def test_any_shape(shape: list[int], length: int, eps: float) -> None:
    check((*shape, length), torch.float32, "cpu", eps)


def test_rows_on_both_sides_of_eps(device: str) -> None:
    x = torch.randn(50, 16, device=device)
    x = x / x.norm(dim=-1, keepdim=True) * torch.linspace(0, 2, 50, device=device)[:, None]
    x, grad_out = x.requires_grad_(), torch.randn(50, 16, device=device)
    torch.testing.assert_close(run(kernels, x, grad_out, eps=0.77), run(plainly, x, grad_out, eps=0.77))


def test_zeros_stay_zeros(device: str) -> None:
    x = torch.zeros(3, 8, dtype=torch.float16, device=device, requires_grad=True)
    got = run(kernels, x, torch.ones(3, 8, device=device), eps=0.5)
    assert torch.equal(got["out"], torch.zeros_like(x)) and torch.equal(got["dx"], torch.full_like(x, 2.0))


def test_a_result_of_another_dtype(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's autocast asks for: 16-bit in, float32 out."""
    monkeypatch.setattr(ops.dispatch, "float32_autocast_dtype", lambda *_: torch.float32)
    x, grad_out = torch.randn(3, 8, device=device).half().requires_grad_(), torch.randn(3, 8, device=device)
    got, wide = run(kernels, x, grad_out), run(plainly, x.detach().float().requires_grad_(), grad_out)
    assert (got["out"].dtype, got["dx"].dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(got["out"], wide["out"])
    torch.testing.assert_close(got["dx"].float(), wide["dx"], rtol=2e-3, atol=2e-3)


def test_bit_equal_over_runs(device: str) -> None:
    x, grad_out = torch.randn(40, 100, device=device).half().requires_grad_(), torch.randn(40, 100, device=device)
    first, *others = (run(kernels, x, grad_out) for _ in range(3))
    assert all(torch.equal(y, other[name]) for other in others for name, y in first.items())


def test_strides(device: str) -> None:
    x, grad_out = torch.randn(30, 24, device=device), torch.randn(24, 30, device=device).T
    got = run(kernels, x.T.contiguous().T.requires_grad_(), grad_out)
    expected = run(kernels, x.clone().requires_grad_(), grad_out.contiguous())
    assert all(torch.equal(y, expected[name]) for name, y in got.items())


def test_no_rows(device: str) -> None:
    x = torch.randn(0, 8, device=device, requires_grad=True)
    assert all(y.shape == (0, 8) for y in run(kernels, x, x.detach()).values())


def test_nan_stays_in_its_row_and_is_not_lost(device: str) -> None:
    x = torch.randn(3, 8, device=device)
    x[1, 2] = torch.nan
    for y in run(kernels, x.requires_grad_(), torch.randn(3, 8, device=device)).values():
        assert y.isnan().all(1).tolist() == [False, True, False] and y.isnan().sum() == 8


def test_nothing_is_kept_but_the_input(device: str) -> None:
    x = torch.randn(3, 8, device=device, requires_grad=True)
    out = kernels(x)
    assert sum(y.numel() for y in out.grad_fn.saved_tensors if y is not x) == 0
    with torch.no_grad():
        assert torch.equal(kernels(x), out)


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool, device: str) -> None:
    x = torch.randn(3, 8, device=device, dtype=torch.float16, requires_grad=train)
    torch.library.opcheck(torch.ops.florence_fast.l2_normalize.default, (x, 1e-12, torch.float16, "triton"))


def test_compiles_in_full(device: str) -> None:
    x, grad_out = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(3, 8, device=device)
    expected, backend = run(kernels, x, grad_out), "inductor" if device == "cuda" else "aot_eager"
    with ops.backend("triton"):
        got = run(torch.compile(ops.l2_normalize, fullgraph=True, backend=backend), x, grad_out)
    assert all(torch.equal(y, got[name]) for name, y in expected.items())


REFUSED = [
    (torch.float32, 8193, "rows of at most 8192 elements, got 8193"),
    (torch.float64, 8, "must be float16, bfloat16 or float32, got torch.float64"),
    (torch.bfloat16, 8, "interpreter cuts values off"),
]


@pytest.mark.parametrize(("dtype", "length", "reason"), REFUSED, ids=[reason[:32] for *_, reason in REFUSED])
def test_what_it_cannot_do_it_refuses_with_the_reason(dtype: torch.dtype, length: int, reason: str) -> None:
    x = torch.randn(2, length, dtype=dtype)
    with pytest.raises(RuntimeError, match=reason):
        kernels(x)
    assert ops.l2_normalize(x).isfinite().all()


def test_auto_never_interprets() -> None:
    assert ops.dispatch.choose("l2_normalize", torch.randn(2, 8)) != "triton"
