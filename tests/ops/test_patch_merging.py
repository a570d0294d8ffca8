"""What patch merging computes: the definition against a loop over tokens and against Hugging Face's Swin, the ``torch``
backend against the definition, and what the op promises beside its values.

Letters: B batch · T frames · H W map height and width · C channels.
"""

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from florence_fast import native, ops
from florence_fast.ops import dispatch
from florence_fast.ops.patch_merging import patch_merging, patch_merging_reference
from florence_fast.ops.patch_merging import torch as patch_merging_torch

NAMES = ("x", "norm_weight", "norm_bias", "weight")
FORWARD = torch.ops.florence_fast.patch_merging.default
BACKWARD = torch.ops.florence_fast.patch_merging_backward.default

SHAPES = {
    "even": (2, 4, 6, 3),
    "odd-height": (2, 5, 4, 3),
    "odd-width": (1, 2, 3, 4),
    "odd-both": (3, 3, 5, 2),
    "one-token": (2, 1, 1, 4),
    "one-row": (1, 1, 4, 3),
    "one-channel": (1, 2, 2, 1),
    "frames": (2, 3, 3, 2, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, mean: float = 0.5) -> tuple[Tensor, ...]:
    """Draw x, norm_weight, norm_bias and weight, which ask for gradients; the first three parameters are wide."""
    channels, wide = shape[-1], torch.promote_types(dtype, torch.float32)
    tensors = (
        torch.randn(*shape).add(mean).to(dtype),
        torch.rand(4 * channels, dtype=wide) + 0.5,
        torch.randn(4 * channels, dtype=wide),
        torch.randn(2 * channels, 4 * channels).mul((4 * channels) ** -0.5).to(dtype),
    )
    return tuple(x.requires_grad_() for x in tensors)


def run(function: Any, tensors: tuple[Tensor, ...], grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(*tensors, **options)
    grads = torch.autograd.grad(out, tensors, grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)}}


def merged_like(x: Tensor) -> Tensor:
    """Draw a gradient of the result."""
    height, width, channels = x.shape[-3:]
    return torch.randn(*x.shape[:-3], (height + 1) // 2, (width + 1) // 2, 2 * channels).to(x)


def by_loop(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Merge token by token."""
    *outer, height, width, channels = x.shape
    maps, merged = x.reshape(-1, height, width, channels), []
    for one in maps:
        for y, z in itertools.product(range(0, height, 2), range(0, width, 2)):
            row = []
            for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1)):
                on_map = y + dy < height and z + dx < width
                row += one[y + dy, z + dx].tolist() if on_map else [0.0] * channels
            mean = sum(row) / len(row)
            std = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + eps)
            norm = torch.tensor([(value - mean) / std for value in row], dtype=x.dtype) * norm_weight + norm_bias
            merged.append(weight @ norm)
    return torch.stack(merged).view(*outer, (height + 1) // 2, (width + 1) // 2, 2 * channels)


def plain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Merge step by step in the dtype of ``x``, as one would write it in PyTorch.

    The norm's parameters are float32, so that its statistics are: a CPU takes them beside 16 bits.
    """
    rows = patch_merging_torch.gather(x)
    return F.linear(F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps), weight)


@shapes
def test_definition_equals_a_loop(shape: tuple[int, ...]) -> None:
    tensors = [x.detach() for x in make(shape)]
    with ops.backend("reference"):
        torch.testing.assert_close(patch_merging(*tensors, eps=1e-3), by_loop(*tensors, eps=1e-3))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)], ids=str)
def test_equals_hugging_face(size: tuple[int, int]) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    theirs = swin.SwinPatchMerging(dim=6).double()
    nn.init.normal_(theirs.norm.weight)
    nn.init.normal_(theirs.norm.bias)
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    tensors = (x, theirs.norm.weight, theirs.norm.bias, theirs.reduction.weight)
    grad_out = merged_like(x)

    def merge(x: Tensor, *_: Tensor) -> Tensor:
        return theirs(x.flatten(1, 2), size).view_as(grad_out)

    expected = run(merge, tensors, grad_out)
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            torch.testing.assert_close(run(patch_merging, tensors, grad_out, eps=theirs.norm.eps), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@shapes
def test_gradcheck(shape: tuple[int, ...], backend: str) -> None:
    with ops.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: patch_merging(*t, eps=1e-2), make(shape), atol=1e-6)


@shapes
def test_torch_backend_equals_the_definition(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(shape)
    grad_out = merged_like(tensors[0])
    expected = run(patch_merging_reference, tensors, grad_out)
    whole = run(patch_merging, tensors, grad_out)
    monkeypatch.setattr(patch_merging_torch, "SLICE_BYTES", 1)  # image by image
    sliced = run(patch_merging, tensors, grad_out)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(sliced, expected)


@pytest.mark.parametrize("mean", [0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_backend_is_as_exact_as_plain_pytorch(dtype: torch.dtype, mean: float) -> None:
    tensors = make((3, 9, 12, 48), dtype, mean)
    grad_out = merged_like(tensors[0])
    exact_tensors = tuple(x.detach().double().requires_grad_() for x in tensors)
    exact = run(patch_merging_reference, exact_tensors, grad_out.double())
    with ops.backend("torch"):
        ours, usual = run(patch_merging, tensors, grad_out), run(plain, tensors, grad_out)
    for name, x in exact.items():
        error, allowed = (((y[name].double() - x).norm() / x.norm()).item() for y in (ours, usual))
        factor = 2 if name == "out" else 3
        assert error <= max(factor * allowed, 1e-6), f"{name}, {dtype}: {error:.2e}, plain PyTorch has {allowed:.2e}"


def test_every_subset_of_gradients() -> None:
    tensors = make((2, 3, 4, 3), torch.float32)
    grad_out = merged_like(tensors[0])
    everything = run(patch_merging, tensors, grad_out)
    for subset in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(1, 4)):
        some = [x.detach().requires_grad_(i in subset) for i, x in enumerate(tensors)]
        grads = torch.autograd.grad(patch_merging(*some), [some[i] for i in subset], grad_out)
        for i, grad in zip(subset, grads, strict=True):
            assert torch.equal(grad, everything[f"d{NAMES[i]}"]), f"{NAMES[i]} when only {subset} are asked for"


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 3), (0, 2, 3, 4, 3), (2, 1, 3, 4, 3)], ids=str)
def test_empty_batch(shape: tuple[int, ...], backend: str) -> None:
    tensors = make(shape, torch.float32)
    with ops.backend(backend):
        got = run(patch_merging, tensors, merged_like(tensors[0]))
    assert got["out"].shape == (*shape[:-3], 2, 2, 6) and got["dx"].shape == shape
    if shape[0] == 0:
        assert not any(got[f"d{name}"].any() for name in NAMES[1:])


def test_any_strides_and_the_input_is_left_alone() -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    grad_out = merged_like(tensors[0])
    turned = tuple(x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in tensors)
    before = [x.clone() for x in turned]
    got = run(patch_merging, tuple(x.requires_grad_() for x in turned), grad_out.mT.contiguous().mT)
    assert all(x.is_contiguous() for x in got.values())
    torch.testing.assert_close(got, run(patch_merging, tensors, grad_out))
    assert all(map(torch.equal, turned, before))


def test_nan_stays_in_its_row() -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    with torch.no_grad():
        tensors[0][1, 4, 2, 1] = math.nan
    out = patch_merging(*tensors)
    assert out[1, 2, 1].isnan().all() and out.isnan().sum() == 6


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool) -> None:
    tensors = tuple(x.detach().requires_grad_(train) for x in make((2, 3, 4, 3), torch.float32))
    torch.library.opcheck(FORWARD, (*tensors, 1e-5, "torch"))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True], [True, False, False, False]], ids=str)
def test_opcheck_backward(needs: list[bool]) -> None:
    tensors = tuple(x.detach() for x in make((2, 3, 4, 3), torch.float32))
    torch.library.opcheck(BACKWARD, (merged_like(tensors[0]), *tensors, needs, 1e-5, "torch"))


def test_compiles_once_for_every_batch_and_map() -> None:
    # eps is given: as a default it is a number that dynamic=True tries to keep open, in a graph that it then drops.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: patch_merging(*t, eps=1e-5), fullgraph=True, dynamic=True, backend=counter)
    parameters = make((1, 1, 1, 3), torch.float32)[1:]
    for shape in ((2, 5, 8, 3), (3, 4, 7, 3), (7, 11, 9, 3)):
        tensors = (torch.randn(shape, requires_grad=True), *parameters)
        grad_out = merged_like(tensors[0])
        expected = run(patch_merging, tensors, grad_out)
        assert all(torch.equal(x, expected[name]) for name, x in run(compiled, tensors, grad_out).items()), shape
        assert counter.frame_count == 1, f"compiled again for {shape}"


def test_inductor_and_frames() -> None:
    tensors = make((2, 3, 5, 4, 3), torch.float32)
    grad_out = merged_like(tensors[0])
    compiled = torch.compile(patch_merging, fullgraph=True)
    torch.testing.assert_close(run(compiled, tensors, grad_out), run(patch_merging, tensors, grad_out))


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameters_of_norm = nn.ParameterList(x.detach() for x in make((1, 1, 1, 3), torch.float32)[1:])

    def forward(self, x: Tensor) -> Tensor:
        return patch_merging(x, *self.parameters_of_norm)


def test_export_with_dynamic_sizes() -> None:
    module = Merging()
    dims = {0: Dim("batch", min=2), 1: Dim("height", min=3), 2: Dim("width", min=3)}
    exported = torch.export.export(module, (torch.randn(2, 6, 9, 3),), dynamic_shapes=(dims,)).module()
    for shape in ((3, 5, 11, 3), (4, 3, 4, 3)):
        x = torch.randn(shape)
        assert torch.equal(exported(x), module(x)), shape


def test_meta_device() -> None:
    tensors = tuple(x.detach().to("meta").requires_grad_() for x in make((2, 5, 4, 3), torch.float32))
    got = run(patch_merging, tensors, torch.empty(2, 3, 2, 6, device="meta"))
    assert got["out"].shape == (2, 3, 2, 6) and got["dweight"].shape == (6, 12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_casts_x_alone(backend: str) -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    with ops.backend(backend):
        expected = patch_merging(tensors[0].bfloat16(), *tensors[1:])
        with torch.autocast("cpu", torch.bfloat16):
            out = patch_merging(*tensors)
            doubled = patch_merging(*(x.double() for x in tensors))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected) and doubled.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=backend == "torch"):
        grads = torch.autograd.grad(out.float().square().sum(), tensors)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.float().square().sum(), tensors)))


def test_activation_checkpointing() -> None:
    tensors = make((2, 5, 4, 3), torch.float32)
    grad_out = merged_like(tensors[0])
    got = run(lambda *t: checkpoint(patch_merging, *t, use_reentrant=False), tensors, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in run(patch_merging, tensors, grad_out).items())


def test_second_derivatives_are_those_of_the_reference() -> None:
    tensors = make((1, 3, 3, 2), torch.float32)

    def second_derivative() -> Tensor:
        (grad,) = torch.autograd.grad(patch_merging(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors[3])[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_auto_takes_native_kernels_on_a_cpu_and_the_library_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make((2, 4, 4, 16), torch.float32)
    assert dispatch.choose("patch_merging", *tensors) == ("cpp" if native.extension() else "torch")
    monkeypatch.setattr(native, "extension", lambda: None)
    assert dispatch.choose("patch_merging", *tensors) == "torch"


GOOD = dict(zip(NAMES, make((2, 5, 4, 3), torch.float32), strict=True))
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(5, 4, 3)}, ValueError, "x must have shape (B, H, W, C) or (B, T, H, W, C), got (5, 4, 3)"),
    ({"x": torch.zeros(2, 0, 4, 3)}, ValueError, "x must have a map of at least one token and one channel"),
    ({"x": torch.zeros(2, 5, 4, 3).long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"norm_weight": None}, TypeError, "norm_weight must be a floating-point tensor, got NoneType"),
    ({"norm_weight": torch.ones(6)}, ValueError, "norm_weight must have shape (12,), got (6,)"),
    ({"norm_bias": torch.ones(6)}, ValueError, "norm_bias must have shape (12,), got (6,)"),
    ({"weight": torch.ones(12, 6)}, ValueError, "weight must have shape (6, 12), got (12, 6)"),
    ({"weight": torch.ones(6, 12, device="meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
    ({"eps": -1.0}, ValueError, "eps must be a number of at least 0, got -1.0"),
    ({"eps": None}, ValueError, "eps must be a number of at least 0, got None"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        patch_merging(**{**GOOD, **change})
