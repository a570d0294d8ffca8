"""Attention in windows that are cut out already: the definition against a loop, and the torch backend against it.

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from florence_fast import ops
from florence_fast.ops.window_attention_partitioned import window_attention_partitioned
from florence_fast.ops.windows import cut_map, merge, partition

BIASES, MASKS = (False, True), ("none", "bool", "added")


def make(dtype: torch.dtype, biased: bool, masked: str, shape: tuple[int, ...] = (6, 2, 9, 8)) -> dict[str, Tensor]:
    _, heads, tokens, _ = shape
    tensors = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name in ("q", "k", "v")}
    if biased:
        tensors["bias"] = torch.randn(heads, tokens, tokens, dtype=torch.float64)
        tensors["bias"] = tensors["bias"].to(torch.promote_types(dtype, torch.float32))
    if masked == "bool":
        tensors["mask"] = torch.rand(3, tokens, tokens) < 0.6
        tensors["mask"] |= torch.eye(tokens, dtype=torch.bool)
    if masked == "added":
        tensors["mask"] = torch.where(torch.rand(3, tokens, tokens) < 0.6, 0.0, -100.0).to(dtype)
    return {name: x if x.dtype == torch.bool else x.requires_grad_() for name, x in tensors.items()}


def attend(backend: str, **kwargs: Any) -> Tensor:
    with ops.backend(backend):
        return window_attention_partitioned(**kwargs)


def run(backend: str, tensors: dict[str, Tensor], grad_out: Tensor, **values: Any) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    out = attend(backend, **tensors, **values)
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def loop_over_pairs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """Attend query by query."""
    out = torch.zeros_like(q)
    for w, head, i in itertools.product(*map(range, q.shape[:3])):
        weights = []
        for j in range(q.shape[2]):
            score = scale * (q[w, head, i] * k[w, head, j]).sum().item()
            score += 0.0 if bias is None else bias[head, i, j].item()
            if mask is not None:
                term = mask[w % len(mask), i, j].item()
                score = (score if term else -math.inf) if mask.dtype == torch.bool else score + term
            weights.append(math.exp(score))
        out[w, head, i] = sum(x * v[w, head, j] for j, x in enumerate(weights)) / sum(weights)
    return out


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("biased", BIASES)
def test_definition(biased: bool, masked: str) -> None:
    tensors = make(torch.float64, biased, masked)
    with torch.no_grad():
        wanted = loop_over_pairs(*(tensors.get(n) for n in ("q", "k", "v", "bias", "mask")), 0.3)
        torch.testing.assert_close(attend("reference", **tensors, scale=0.3), wanted)


def test_is_what_window_attention_does() -> None:
    qkv, bias = torch.randn(2, 8, 6, 3 * 32), torch.randn(2, 12, 12)
    cut = cut_map((8, 6), (4, 3), (0, 0))
    q, k, v = partition(qkv, cut, 3, 2, torch.float32)
    got = merge(window_attention_partitioned(q, k, v, bias)[None], cut, torch.float32)
    torch.testing.assert_close(got, ops.window_attention(qkv, window_size=(4, 3), num_heads=2, bias=bias))


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, masked: str) -> None:
    tensors = make(torch.float64, True, masked, (3, 1, 4, 3))
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *xs: attend(backend, **dict(zip(names, xs, strict=True))), list(tensors.values())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("biased", BIASES)
def test_torch_backend(biased: bool, masked: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    tensors = make(dtype, biased, masked)
    exact_tensors = {
        n: x if x.dtype == torch.bool else x.detach().double().requires_grad_() for n, x in tensors.items()
    }
    grad_out = torch.randn(6, 2, 9, 8, dtype=torch.float64).to(dtype)
    ours, exact = run("torch", tensors, grad_out), run("reference", exact_tensors, grad_out.double())
    with torch.no_grad():
        ours["inference"], exact["inference"] = attend("torch", **tensors), exact["out"]
    # What plain PyTorch leaves in these dtypes; the sums of the mask's gradient cancel.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, x in exact.items():
        error = ((ours[name].double() - x).norm() / x.norm()).item()
        assert error <= tolerance, f"{name} {dtype}: {error:.1e}"
        assert ours[name].dtype == (dtype if name in ("out", "inference") else tensors[name[1:]].dtype)


def test_strides_and_every_subset_of_gradients() -> None:
    tensors = make(torch.float32, True, "added")
    grad_out = torch.randn(6, 2, 9, 8)
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in tensors.items()}
    expected, got = run("torch", tensors, grad_out), run("torch", turned, grad_out.mT.contiguous().mT)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x)
    for count in range(1, 5):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run("torch", some, grad_out).items():
                assert torch.equal(x, expected[name]), f"{name} when only {subset} are asked for"


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("masked", MASKS)
def test_opcheck(masked: str, train: bool) -> None:
    tensors = {
        n: x.requires_grad_(train and x.is_floating_point()) for n, x in make(torch.float32, True, masked).items()
    }
    given = [tensors.get(n) for n in ("q", "k", "v", "bias", "mask")]
    torch.library.opcheck(torch.ops.florence_fast.window_attention_partitioned.default, (*given, 0.3, train, "torch"))


def test_compiles_in_full_and_exports() -> None:
    tensors = make(torch.float32, True, "bool")
    compiled = torch.compile(window_attention_partitioned, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**tensors), window_attention_partitioned(**tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), tensors["bias"]) for x in (out, expected)]
    assert torch.equal(grads[0][0], grads[1][0])

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention_partitioned(q, k, v)

    given = tuple(tensors[n].detach() for n in "qkv")
    exported = torch.export.export(Attention(), given).module()
    torch.testing.assert_close(exported(*given), window_attention_partitioned(*given))


def test_no_windows() -> None:
    tensors = make(torch.float32, True, "bool", (0, 2, 9, 8))
    got = run("torch", tensors, torch.zeros(0, 2, 9, 8))
    assert got["out"].shape == (0, 2, 9, 8) and not got["dbias"].any()


def test_autocast() -> None:
    tensors = make(torch.float32, True, "bool")
    with torch.autocast("cpu", torch.bfloat16):
        assert window_attention_partitioned(**tensors).dtype == torch.bfloat16


def test_nan_is_not_lost() -> None:
    tensors = make(torch.float32, False, "none")
    with torch.no_grad():
        tensors["k"][2, 1, 3, 4] = math.nan
    grad_out = torch.ones(6, 2, 9, 8)
    ours, exact = (run(backend, tensors, grad_out) for backend in ("torch", "reference"))
    assert ours["out"][2, 1].isnan().all() and not ours["out"][[0, 1, 3, 4, 5]].isnan().any()
    for name, x in exact.items():
        assert torch.equal(ours[name].isnan(), x.isnan()), name


def test_auto_takes_torch_and_others_say_why_not() -> None:
    tensors = make(torch.float32, True, "bool")
    assert ops.dispatch.choose("window_attention_partitioned", **tensors) == "torch"
    with pytest.raises(RuntimeError, match="no native kernel for window_attention_partitioned in this version"):
        attend("cpp", **tensors)


q = torch.zeros(6, 2, 9, 8)
WRONG = [
    ({"q": [1.0]}, TypeError, "q must be a floating-point tensor, got list"),
    ({"v": q.long()}, TypeError, "v must be a floating-point tensor, got torch.int64"),
    ({"mask": torch.zeros(3, 9, 9).long()}, TypeError, "mask must be a floating-point or bool tensor"),
    ({"q": q[0]}, ValueError, r"q must have shape \(B\*M, h, N, d\)"),
    ({"k": q[:, :, :8]}, ValueError, r"k must have the shape and dtype of q, \(6, 2, 9, 8\)"),
    ({"k": q.half()}, ValueError, "k must have the shape and dtype of q"),
    ({"bias": torch.zeros(2, 8, 9)}, ValueError, r"bias must have shape \(2, 9, 9\), got \(2, 8, 9\)"),
    ({"mask": torch.zeros(3, 9, 8)}, ValueError, r"mask must have shape \(M, 9, 9\), got \(3, 9, 8\)"),
    ({"mask": torch.zeros(4, 9, 9)}, ValueError, "divides those of q, 6, got 4"),
    ({"mask": torch.zeros(3, 9, 9, device="meta")}, ValueError, "mask must be on the device of q, cpu, got meta"),
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        window_attention_partitioned(**{"q": q, "k": q, "v": q, **change})
