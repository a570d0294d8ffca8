"""Deformable convolution: the definition against torchvision's results, plain loops and F.conv2d, the ``torch`` backend
against the definition, and what the op promises beside its values.

Letters: B batch · H W map height and width · C channels · G offset groups · K taps, kh times kw.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from florence_fast import native, ops
from florence_fast.ops import dispatch
from florence_fast.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference
from florence_fast.ops.deform_conv2d import torch as deform_conv2d_torch
from tests.ops.rounding import relative_error

FORWARD = torch.ops.florence_fast.deform_conv2d.default
BACKWARD = torch.ops.florence_fast.deform_conv2d_backward.default
FIXTURE = json.loads(Path(__file__).with_name("torchvision.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Force the ``torch`` backend where a test names no other: a CPU has native kernels too."""
    with ops.backend("torch"):
        yield


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    size: tuple[int, int] = (5, 7)
    channels: int = 4
    out_channels: int = 6
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    offset_groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    mask: bool = True
    bias: bool = True
    reach: float = 1.5
    batch: int = 2

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw the tensors, which ask for gradients, and give the other arguments."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = [(n + 2 * p - (d * (k - 1) + 1)) // s + 1 for n, k, s, p, d in axes]
        taps = self.offset_groups * self.kernel[0] * self.kernel[1]
        tensors = {
            "input": torch.randn(self.batch, self.channels, *self.size),
            "offset": torch.randn(self.batch, 2 * taps, *out) * self.reach,
            "weight": torch.randn(self.out_channels, self.channels // self.groups, *self.kernel),
        }
        if self.bias:
            tensors["bias"] = torch.randn(self.out_channels)
        if self.mask:
            tensors["mask"] = torch.rand(self.batch, taps, *out)
        values = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}, values


CASES = {
    "three-by-three": Case(),
    "groups-strides-dilations": Case((9, 8), 6, 4, (3, 2), 2, 3, (2, 1), (1, 2), (1, 2)),
    "one-tap-no-mask-no-bias": Case(kernel=(1, 1), padding=(0, 0), mask=False, bias=False),
    "far-off-the-map": Case((3, 4), reach=20.0),
    "depthwise": Case(channels=4, out_channels=4, groups=4, offset_groups=4, batch=1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(function: Any, tensors: dict[str, Tensor], values: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(**tensors, **values)
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype), materialize_grads=True)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def grad_like(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    shape = (case.batch, case.out_channels, *tensors["offset"].shape[2:])
    return torch.randn(shape).to(tensors["input"])


def in_loops(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None) -> Tensor:
    """Compute the result number by number, each sample by the four pixels around it."""
    batch, channels, height, width = input.shape
    out_channels, per_group, kh, kw = weight.shape
    offset_groups, groups = offset.shape[1] // (2 * kh * kw), channels // per_group
    out = torch.zeros(batch, out_channels, *offset.shape[2:], dtype=input.dtype)
    for b, o, i, j, c, u, v in itertools.product(*map(range, (batch, *out.shape[1:], per_group, kh, kw))):
        channel = o // (out_channels // groups) * per_group + c
        tap = channel // (channels // offset_groups) * kh * kw + u * kw + v
        y = i * stride[0] - padding[0] + u * dilation[0] + offset[b, 2 * tap, i, j].item()
        x = j * stride[1] - padding[1] + v * dilation[1] + offset[b, 2 * tap + 1, i, j].item()
        value = 0.0
        for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                value += input[b, channel, row, column].item() * (1 - abs(y - row)) * (1 - abs(x - column))
        out[b, o, i, j] += weight[o, c, u, v].item() * value * (1.0 if mask is None else mask[b, tap, i, j].item())
    return out if bias is None else out + bias[:, None, None]


def plainly(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None) -> Tensor:
    """Compute in the dtype of ``input``, positions apart, by gathering from a map with a border of zeros."""
    (_, channels, height, width), (kh, kw), out = input.shape, weight.shape[2:], offset.shape[2:]
    padded = F.pad(input, (1, 2, 1, 2))
    moved = offset.to(torch.promote_types(offset.dtype, torch.float32)).unflatten(1, (-1, kh, kw, 2))
    place_y, place_x = (torch.arange(n, device=input.device) for n in out)
    tap_y, tap_x = (torch.arange(n, device=input.device) for n in (kh, kw))
    y = (tap_y * dilation[0] - padding[0])[:, None, None, None] + (place_y * stride[0])[:, None] + moved[:, :, :, :, 0]
    x = (tap_x * dilation[1] - padding[1])[:, None, None] + place_x * stride[1] + moved[:, :, :, :, 1]
    y, x = y.clamp(-1, height) + 1, x.clamp(-1, width) + 1
    y0, x0 = y.detach().floor(), x.detach().floor()
    fy, fx = (y - y0).to(input.dtype)[:, :, None], (x - x0).to(input.dtype)[:, :, None]
    flat = padded.flatten(2).unflatten(1, (y.shape[1], -1))

    def pixel(down: int, right: int) -> Tensor:
        index = ((y0 + down) * (width + 3) + x0 + right).long()[:, :, None].flatten(3)
        return flat.gather(3, index.expand(-1, -1, flat.shape[2], -1)).unflatten(3, y.shape[2:])

    upper = pixel(0, 0) * (1 - fx) + pixel(0, 1) * fx
    lower = pixel(1, 0) * (1 - fx) + pixel(1, 1) * fx
    samples = upper * (1 - fy) + lower * fy
    if mask is not None:
        samples = samples * mask.to(input.dtype).unflatten(1, (-1, 1, kh, kw))
    columns = samples.flatten(1, 2).flatten(1, 3).flatten(2).unflatten(1, (channels // weight.shape[1], -1))
    result = weight.flatten(1).unflatten(0, (columns.shape[1], -1)) @ columns
    result = result.flatten(1, 2).unflatten(2, out)
    return result if bias is None else result + bias[:, None, None]


def wave(*shape: int, step: float, scale: float = 1.0) -> Tensor:
    """Give numbers that need no generator: the fixture was computed from the same."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().mul(scale).view(shape)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FIXTURE["deform_conv2d"])
def test_equals_torchvision(name: str, backend: str) -> None:
    case = FIXTURE["deform_conv2d"][name]
    size, weight, taps = case["size"], case["weight"], case["offset_groups"] * math.prod(case["weight"][2:])
    values = {name: case[name] for name in ("stride", "padding", "dilation")}
    axes = zip(size[2:], weight[2:], *values.values(), strict=True)
    out = [(n + 2 * p - (d * (k - 1) + 1)) // s + 1 for n, k, s, p, d in axes]
    tensors = {
        "input": wave(*size, step=0.7),
        "offset": wave(size[0], 2 * taps, *out, step=1.3, scale=case["scale"]),
        "weight": wave(*weight, step=0.9),
        "bias": wave(weight[0], step=2.1),
    }
    if case["mask"]:
        tensors["mask"] = wave(size[0], taps, *out, step=0.3)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    with ops.backend(backend):
        found = run(deform_conv2d, tensors, values, wave(size[0], weight[0], *out, step=0.11))
    assert found.keys() == case["results"].keys()
    for name, wanted in case["results"].items():
        x = found[name].flatten()
        some = x[:: max(1, len(x) // 32)]
        torch.testing.assert_close(some, torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["three-by-three", "groups-strides-dilations", "one-tap-no-mask-no-bias"])
def test_definition_equals_loops(name: str) -> None:
    tensors, values = replace(CASES[name], batch=1).make(torch.float64)
    torch.testing.assert_close(deform_conv2d_reference(**tensors, **values), in_loops(**tensors, **values))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_offsets_it_is_a_convolution(backend: str) -> None:
    case = Case((9, 8), 6, 4, (3, 2), 2, 3, (2, 1), (1, 2), (1, 2), reach=0.0, mask=False)
    tensors, values = case.make(torch.float64)
    with ops.backend(backend):
        out = deform_conv2d(**tensors, **values)
    expected = F.conv2d(*(tensors[name] for name in ("input", "weight", "bias")), **values, groups=2)
    torch.testing.assert_close(out, expected)


def test_whole_offsets_differentiate_to_the_right() -> None:
    """At a pixel the slope has two sides; torchvision takes the one to the next pixel, at the border too."""
    offset = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    input, weight = torch.tensor([[[[2.0, 5.0], [11.0, 0.0]]]]).double(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for padding, size, wanted in ((0, 2, [9.0, 3.0]), (1, 4, [0.0, 0.0])):
        moved = offset.expand(1, 2, size, size)
        for backend in ("reference", "torch"):
            with ops.backend(backend):
                out = deform_conv2d(input, moved, weight, padding=padding)
            (slope,) = torch.autograd.grad(out[0, 0, 0, 0], offset)
            assert slope.flatten().tolist() == wanted
    with ops.backend("torch"):
        out = deform_conv2d(input, offset.expand(1, 2, 4, 4), weight, padding=1)
    assert torch.autograd.grad(out[0, 0, 0, 1], offset)[0].flatten().tolist() == [2.0, 0.0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["groups-strides-dilations", "one-tap-no-mask-no-bias", "far-off-the-map"])
def test_gradcheck(name: str, backend: str) -> None:
    tensors, values = replace(CASES[name], size=(4, 3), batch=1, out_channels=2).make(torch.float64)

    def function(*inputs: Tensor) -> Tensor:
        return deform_conv2d(**dict(zip(tensors, inputs, strict=True)), **values)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=backend == "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, poisoned_memory: None) -> None:
    tensors, values = case.make(dtype)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    grad_out = grad_like(case, tensors)
    exact = run(deform_conv2d_reference, exact_tensors, values, grad_out.double())
    ours, usual = run(deform_conv2d, tensors, values, grad_out), run(plainly, tensors, values, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == dtype
        allowed = (2 if name == "out" else 3) * relative_error(usual[name], x)
        floor = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0.0)
        assert relative_error(ours[name], x) <= max(allowed, floor), name


def test_auto_takes_native_kernels_on_a_cpu_or_library_calls() -> None:
    tensors, values = Case().make(torch.float32)
    with ops.backend("auto"):
        assert dispatch.choose("deform_conv2d", **tensors, **values) == ("cpp" if native.extension() else "torch")


@pytest.mark.parametrize("name", ["three-by-three", "one-tap-no-mask-no-bias"])
def test_every_subset_of_gradients(name: str) -> None:
    tensors, values = CASES[name].make(torch.float32)
    grad_out = grad_like(CASES[name], tensors)
    everything = run(deform_conv2d, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(deform_conv2d(**some, **values), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


def test_columns_of_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, values = replace(Case(), batch=5).make(torch.float64)
    grad_out, most = torch.randn(5, 6, 5, 7, dtype=torch.float64), []
    whole = run(deform_conv2d, tensors, values, grad_out)
    sample = deform_conv2d_torch.LibrarySampler.sample
    monkeypatch.setattr(deform_conv2d_torch, "COLUMN_BYTES", {"cpu": 2 * 8 * 5 * 7 * 9 * 4})

    def watched(*args: Any) -> Tensor:
        columns = sample(*args)
        most.append(columns.nbytes)
        return columns

    monkeypatch.setattr(deform_conv2d_torch.LibrarySampler, "sample", staticmethod(watched))
    parts = run(deform_conv2d, tensors, values, grad_out)
    assert most == [2 * 8 * 5 * 7 * 9 * 4] * 2 + [8 * 5 * 7 * 9 * 4]
    for name, x in whole.items():
        torch.testing.assert_close(parts[name], x, msg=name)


def test_gradients_are_bit_equal_over_runs_and_threads() -> None:
    case, threads = Case((24, 24), 32, reach=30.0), torch.get_num_threads()
    tensors, values = case.make(torch.float32)
    grad_out, results = grad_like(case, tensors), []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(deform_conv2d, tensors, values, grad_out))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for name in ("dinput", "doffset", "dmask"):
        assert torch.equal(results[1][name], results[2][name])
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["three-by-three", "one-tap-no-mask-no-bias"])
def test_opcheck(name: str, train: bool) -> None:
    case = CASES[name]
    tensors, _ = case.make(torch.float32)
    tensors = {n: x.detach().requires_grad_(train) for n, x in tensors.items()}
    arguments = [tensors.get(n) for n in ("input", "offset", "mask", "weight", "bias")]
    torch.library.opcheck(FORWARD, (*arguments, *map(list, (case.stride, case.padding, case.dilation)), "torch"))


def test_opcheck_backward() -> None:
    tensors, _ = Case().make(torch.float32)
    arguments = [tensors[n].detach() for n in ("input", "offset", "mask", "weight", "bias")]
    grad_out = torch.randn(2, 6, 5, 7)
    for needs in ([True] * 5, [False, False, True, True, False]):
        torch.library.opcheck(BACKWARD, (grad_out, *arguments, needs, [1, 1], [1, 1], [1, 1], "torch"))


def test_compiles_once_for_every_batch_and_map() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in ((2, (5, 7)), (3, (5, 7)), (4, (9, 6))):
        case = replace(Case(), batch=batch, size=size)
        tensors, values = case.make(torch.float32)
        grad_out = grad_like(case, tensors)
        found, expected = run(compiled, tensors, values, grad_out), run(deform_conv2d, tensors, values, grad_out)
        assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert counter.frame_count == 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Conv2d(4, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.places(x).split([18, 9], 1)
        return deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid())


def test_export_with_dynamic_sizes() -> None:
    module, dims = Layer(), {0: Dim("batch", min=2), 2: Dim("height", min=3), 3: Dim("width", min=3)}
    exported = torch.export.export(module, (torch.randn(2, 4, 6, 9),), dynamic_shapes=(dims,)).module()
    for shape in ((3, 4, 5, 11), (4, 4, 8, 3)):
        x = torch.randn(shape)
        assert torch.equal(exported(x), module(x)), shape


def test_meta_device() -> None:
    tensors, values = Case().make(torch.float32, "meta")
    out = deform_conv2d(**tensors, **values)
    assert out.shape == (2, 6, 5, 7) and out.device.type == "meta"
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert [g.shape for g in grads] == [x.shape for x in tensors.values()]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_leaves_positions_alone(backend: str) -> None:
    tensors, values = Case().make(torch.float32)
    low = {name: x.bfloat16() if name in ("input", "weight", "bias") else x for name, x in tensors.items()}
    with ops.backend(backend):
        expected = deform_conv2d(**low, **values)
        with torch.autocast("cpu", torch.bfloat16):
            out = deform_conv2d(**tensors, **values)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_batch(backend: str) -> None:
    tensors, values = replace(Case(), batch=0).make(torch.float32)
    with ops.backend(backend):
        found = run(deform_conv2d, tensors, values, torch.zeros(0, 6, 5, 7))
    assert found["out"].shape == (0, 6, 5, 7) and found["doffset"].shape == (0, 18, 5, 7)
    assert not found["dweight"].any() and not found["dbias"].any()


def test_any_strides() -> None:
    tensors, values = Case().make(torch.float32)
    grad_out = torch.randn(2, 6, 5, 7)
    turned = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in tensors.items() if x.ndim == 4}
    turned["bias"] = tensors["bias"].detach().repeat_interleave(2)[::2].requires_grad_()
    turned = {name: turned[name] for name in tensors}
    assert not any(x.is_contiguous() for x in turned.values())
    found, expected = run(deform_conv2d, turned, values, grad_out), run(deform_conv2d, tensors, values, grad_out)
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


@pytest.mark.parametrize("name", ["input", "offset", "mask", "weight"])
def test_nan_is_not_lost_and_reaches_nothing_else(name: str) -> None:
    tensors, values = Case().make(torch.float32)
    with torch.no_grad():
        tensors[name][0, 1, 0, 0] = math.nan
    grad_out = torch.randn(2, 6, 5, 7)
    ours, exact = run(deform_conv2d, tensors, values, grad_out), run(deform_conv2d_reference, tensors, values, grad_out)
    assert ours["out"].isnan().any() and not ours["out"].isnan().all()
    for key in ("out", "dinput", "dweight", "dbias", "dmask"):
        assert torch.equal(ours[key].isnan(), exact[key].isnan()), key


def test_second_derivatives_are_those_of_the_reference() -> None:
    tensors, values = Case().make(torch.float32)

    def second_derivative() -> Tensor:
        out = deform_conv2d(**tensors, **values)
        (grad,) = torch.autograd.grad(out.square().sum(), tensors["input"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors["weight"])[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


GOOD, VALUES = Case().make(torch.float32)
BAD = [
    ({"input": [1.0]}, TypeError, "input must be a floating-point tensor, got list"),
    ({"offset": GOOD["offset"].long()}, TypeError, "offset must be a floating-point tensor, got torch.int64"),
    ({"weight": GOOD["weight"].double()}, TypeError, "weight must have the dtype of input, torch.float32, got"),
    ({"mask": GOOD["mask"].to("meta")}, ValueError, "mask must be on the device of input, cpu, got meta"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"padding": (1, -1)}, ValueError, "padding must be at least 0, got (1, -1)"),
    ({"dilation": (1, 1, 1)}, ValueError, "dilation must be one int or two of them, got (1, 1, 1)"),
    ({"input": torch.zeros(4, 5, 7)}, ValueError, "input must have shape (B, Cin, H, W), none but B zero, got (4, 5"),
    ({"weight": torch.zeros(6, 0, 3, 3)}, ValueError, "weight must have shape (Cout, Cin/groups, kh, kw), none zero"),
    ({"weight": torch.zeros(6, 3, 3, 3)}, ValueError, "with Cin=4 and Cout divisible by the number of groups, got (6"),
    ({"weight": torch.zeros(7, 2, 3, 3)}, ValueError, "with Cin=4 and Cout divisible by the number of groups, got (7"),
    ({"dilation": 4}, ValueError, "the map must hold the kernel at least once, got (2, 4, 5, 7)"),
    ({"offset": torch.zeros(2, 19, 5, 7)}, ValueError, "offset must have shape (B, 18*groups, Hout, Wout), got (2, 19"),
    ({"offset": torch.zeros(2, 54, 5, 7)}, ValueError, "offset has 3 groups, which must divide Cin=4"),
    ({"offset": torch.zeros(2, 18, 5, 6)}, ValueError, "offset must have shape (2, 18, 5, 7), got (2, 18, 5, 6)"),
    ({"mask": torch.zeros(2, 18, 5, 7)}, ValueError, "mask must have shape (2, 9, 5, 7), got (2, 18, 5, 7)"),
    ({"bias": torch.zeros(5)}, ValueError, "bias must have shape (6,), got (5,)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        deform_conv2d(**{**GOOD, **VALUES, **change})
