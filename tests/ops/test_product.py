"""Which library computes a product: the rule for each kind of processor, and that nothing else is called."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from florence_fast import native, ops, processor
from florence_fast.ops import _product

RULES = {
    ("AuthenticAMD", "AVX512"): "onednn",
    ("AuthenticAMD", "AVX2"): "plain",
    ("AuthenticAMD", "DEFAULT"): "plain",
    ("GenuineIntel", "AVX512"): "plain",
    ("GenuineIntel", "AVX2"): "plain",
    ("", "DEFAULT"): "plain",
}
"""Maker and vector instructions -> the library of short float32 products; for long ones see test_matmul_cpp."""


class Calls(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def pretend(monkeypatch: pytest.MonkeyPatch, vendor: str, instructions: str) -> None:
    monkeypatch.setattr(processor, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)


@pytest.mark.skipif(not _product._has_onednn(torch.float32), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize(("kind", "library"), RULES.items(), ids=["-".join(kind) for kind in RULES])
def test_the_library_of_each_kind_of_processor(
    kind: tuple[str, str], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *kind)
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5)
    x.requires_grad_()
    with Calls() as calls:
        out = ops.linear(x, weight, bias)
        torch.autograd.grad(out.sum(), (x, weight))
        with torch.no_grad():
            _product.linear_into(torch.empty(6, 5), x, weight, bias)
    used = {"onednn": "_linear_pointwise" in calls.names, "plain": bool({"addmm", "mm"} & set(calls.names))}
    assert used == {"onednn": library == "onednn", "plain": library == "plain"}, calls.names


def test_the_plain_products_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed operands are read as they lie: none of the three products of a layer makes a copy."""
    pretend(monkeypatch, "AuthenticAMD", "AVX2")
    x, weight, bias, grad = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5), torch.randn(6, 5)
    with Calls() as calls:
        _product.linear(x, weight, bias)
        _product.linear_into(torch.empty(6, 5), x, weight, bias)
        _product.matmul(grad, weight)
        _product.matmul_over_rows(grad, x)
    assert not {"copy_", "clone", "contiguous", "_to_copy"} & set(calls.names), calls.names


def test_the_library_is_a_rule_and_no_measurement() -> None:
    """A choice by time could differ between a run and its resumption, and so would the bits."""
    kind = (processor.vendor(), torch.backends.cpu.get_cpu_capability())
    found = _product.FLOAT32_LIBRARIES.get(kind, "plain")
    if not (native.levels() and native.level() == "avx2"):
        found = found.replace("native", "plain")
    assert [_product.library(torch.float32) for _ in range(2)] == [found, found]
    assert _product.library(torch.bfloat16) == "onednn"


def test_any_library_gives_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(33, 40).double(), torch.randn(24, 40).double(), torch.randn(24).double()
    for vendor, instructions in RULES:
        pretend(monkeypatch, vendor, instructions)
        got = _product.linear(x.float(), weight.float(), bias.float())
        torch.testing.assert_close(got.double(), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
