"""The native product of float32 matrices against float64, at every level that runs here."""

import itertools

import pytest
import torch
from torch import Tensor

from florence_fast import native, processor
from florence_fast.ops import _product

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
# (M, N, K): smaller than a tile, edges of tiles, several blocks of each axis, parts of a deep product, no depth
SIZES = [(1, 1, 1), (7, 5, 3), (97, 33, 300), (385, 401, 513), (49, 96, 96), (31, 40, 9001), (5, 6, 0)]


def _matrix(rows: int, columns: int, order: str) -> Tensor:
    """Make a matrix whose rows, columns or neither are in one piece."""
    if order == "rows":
        return torch.randn(rows, columns + 3)[:, 2 : columns + 2]
    if order == "columns":
        return torch.randn(columns, rows + 1)[:, 1:].T
    return torch.randn(rows, columns, 2)[..., 0]


def _check(M: int, N: int, K: int, left: str, right: str, biased: bool) -> None:
    a, b, bias = _matrix(M, K, left), _matrix(K, N, right), torch.randn(N) if biased else None
    around = torch.full((M + 2, N + 5), float("nan"))
    out = around[1:-1, 2 : N + 2]
    _product._native(a, b, bias, out)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    plain = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    allowed = 2 * (plain - exact).norm() + 1e-6 * exact.norm()
    assert (out - exact).norm() <= allowed
    assert torch.isnan(around).sum() == around.numel() - M * N, "written beside the result"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_and_strides(size: tuple[int, int, int], level: str) -> None:
    orders = ("rows", "columns", "neither")
    for left, right, biased in itertools.product(orders, orders, (False, True)):
        _check(*size, left, right, biased)


def test_the_bits_do_not_depend_on_the_number_of_threads(level: str) -> None:
    a, b, deep = torch.randn(500, 70), torch.randn(70, 450), torch.randn(9000, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs = torch.empty(500, 450), torch.empty(40, 40)
            _product._native(a, b, None, outs[0])
            _product._native(deep.T, deep, None, outs[1])
            results.append(outs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_products_that_are_long_enough_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way into the kernel gives the product, and short products stay with the library."""
    monkeypatch.setattr(processor, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if "avx2" not in native.levels():
        pytest.skip("the level avx2 does not run here")
    monkeypatch.setenv("FLORENCE_FAST_CPU", "avx2")
    seen: list[tuple[int, ...]] = []
    ours = _product._native
    monkeypatch.setattr(_product, "_native", lambda a, *rest: (seen.append(tuple(a.shape)), ours(a, *rest))[1])
    x, weight, bias, grad = torch.randn(300, 120), torch.randn(140, 120), torch.randn(140), torch.randn(300, 140)
    into, into_dx = torch.full((300, 140), float("nan")), torch.full((300, 120), float("nan"))
    _product.linear_into(into, x, weight, bias)
    _product.matmul_into(into_dx, grad, weight)
    exact = x.double() @ weight.double().T + bias.double()
    results = [
        (into, exact),
        (
            _product.linear(x.view(2, 150, 120), weight, bias).view(300, 140),
            x.double() @ weight.double().T + bias.double(),
        ),
        (into_dx, grad.double() @ weight.double()),
        (_product.matmul(grad, weight), grad.double() @ weight.double()),
        (_product.matmul_over_rows(grad, x), grad.double().T @ x.double()),
    ]
    assert seen == [(300, 120), (300, 140), (300, 120), (300, 140), (140, 300)]
    for got, exact in results:
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    seen.clear()
    _product.linear(x[:100], weight, bias)
    _product.matmul_over_rows(torch.randn(4000, 30), torch.randn(4000, 40))
    assert not seen
