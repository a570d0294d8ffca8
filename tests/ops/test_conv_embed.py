"""What conv_embed computes: the definition against a loop over windows, Hugging Face's CvT and CoSwin's own modules,
the ``torch`` backend against the definition, and what the op promises beside its values.

Letters: B batch · T frames · H W map height and width · C channels.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from florence_fast import ops
from florence_fast.models.coswin import ConvEmbed, ConvStem
from florence_fast.ops import dispatch
from florence_fast.ops.conv_embed import conv_embed, conv_embed_reference

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    shape: tuple[int, ...]
    width: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 2
    padding: int | tuple[int, ...] = 1
    bias: bool = True

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw the tensors, which ask for gradients, and give the other arguments."""
        wide, channels = torch.promote_types(dtype, torch.float32), self.shape[-1]
        tensors = {
            "x": torch.randn(self.shape).to(dtype),
            "weight": torch.randn(self.width, channels, *self.kernel).to(dtype) / math.prod(self.kernel) ** 0.5,
            "bias": torch.randn(self.width).to(dtype) if self.bias else None,
            "norm_weight": torch.rand(self.width, dtype=wide) + 0.5,
            "norm_bias": torch.randn(self.width, dtype=wide),
        }
        for x in tensors.values():
            if x is not None:
                x.requires_grad_()
        return tensors, {"stride": self.stride, "padding": self.padding}


CASES = {
    "merge": Case((2, 6, 6, 3), 4, (3, 3)),
    "merge-odd-without-bias": Case((2, 5, 3, 2), 3, (3, 3), bias=False),
    "stem": Case((1, 12, 8, 3), 4, (7, 7), 4, 2),
    "not-square": Case((2, 5, 6, 2), 3, (2, 3), (1, 2), (0, 1)),
    "one-token": Case((1, 1, 1, 2), 3, (3, 3)),
    "frames": Case((2, 3, 4, 5, 2), 3, (2, 3, 3), (1, 2, 2), (0, 1, 1)),
    "frames-one-stride": Case((1, 4, 4, 4, 1), 2, (3, 3, 3), 2, 1, bias=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(function: Any, tensors: dict[str, Tensor], options: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Give the result and every gradient by name, for a gradient of the result that the seed fixes."""
    out = function(**tensors, **options)
    given = {name: x for name, x in tensors.items() if x is not None}
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    grads = torch.autograd.grad(out, list(given.values()), grad_out)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def by_loop(x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, **options: Any):
    """Convolve and normalise window by window, in 2-D."""
    strides, paddings = (
        (value, value) if isinstance(value, int) else value for value in (options["stride"], options["padding"])
    )
    sides = weight.shape[2:]
    size = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[1:3], paddings, sides, strides, strict=True)]
    out = torch.zeros(len(x), *size, len(weight), dtype=x.dtype)
    for b, y, z in itertools.product(range(len(x)), *map(range, size)):
        token = torch.zeros(len(weight), dtype=x.dtype) if bias is None else bias.clone()
        for i, j in itertools.product(*map(range, sides)):
            row, column = y * strides[0] + i - paddings[0], z * strides[1] + j - paddings[1]
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                token += weight[:, :, i, j] @ x[b, row, column]
        std = (token.var(unbiased=False) + 1e-5).sqrt()
        out[b, y, z] = (token - token.mean()) / std * norm_weight + norm_bias
    return out


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.shape) == 4])
def test_definition_equals_a_loop(name: str) -> None:
    tensors, options = CASES[name].make()
    tensors = {name: x if x is None else x.detach() for name, x in tensors.items()}
    with ops.backend("reference"):
        torch.testing.assert_close(conv_embed(**tensors, **options), by_loop(**tensors, **options))


def test_frames_that_no_window_joins_are_maps() -> None:
    tensors, _ = Case((2, 3, 4, 5, 2), 3, (1, 3, 3)).make()
    out = conv_embed(**tensors, stride=(1, 2, 2), padding=(0, 1, 1))
    tensors |= {"x": tensors["x"].flatten(0, 1), "weight": tensors["weight"].squeeze(2)}
    torch.testing.assert_close(out.flatten(0, 1), conv_embed(**tensors, stride=2, padding=1))


def test_equals_hugging_face() -> None:
    cvt = pytest.importorskip("transformers.models.cvt.modeling_cvt")
    theirs = cvt.CvtConvEmbeddings(patch_size=3, num_channels=4, embed_dim=6, stride=2, padding=1).double()
    nn.init.normal_(theirs.normalization.weight)
    x = torch.randn(2, 5, 8, 4, dtype=torch.float64)
    expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    parameters = (theirs.projection.weight, theirs.projection.bias, *theirs.normalization.parameters())
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            got = conv_embed(x, *parameters, stride=2, padding=1, eps=theirs.normalization.eps)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_equals_the_modules_of_coswin_to_the_last_bit(autocast: bool) -> None:
    stem, merge = ConvStem(3, 8), ConvEmbed(8, 16, kernel=3, stride=2, padding=1, bias=False)
    image = torch.randn(2, 3, 32, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = stem(image)
        expected = merge(x)
        ours = conv_embed(
            image.movedim(1, -1), stem.proj.weight, stem.proj.bias, *stem.norm.parameters(), stride=4, padding=2
        )
        assert ours.dtype == x.dtype and torch.equal(ours, x)
        ours = conv_embed(x, merge.proj.weight, None, *merge.norm.parameters(), stride=2, padding=1)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@cases
def test_gradcheck(case: Case, backend: str) -> None:
    tensors, options = case.make()
    names = [name for name, x in tensors.items() if x is not None]

    def embed(*values: Tensor) -> Tensor:
        return conv_embed(**{**tensors, **dict(zip(names, values, strict=True))}, **options, eps=1e-2)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(embed, [tensors[name] for name in names], atol=1e-6)


@cases
def test_torch_backend_equals_the_definition(case: Case) -> None:
    tensors, options = case.make()
    torch.testing.assert_close(run(conv_embed, tensors, options), run(conv_embed_reference, tensors, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(dtype: torch.dtype) -> None:
    tensors, options = Case((2, 12, 12, 8), 32, (3, 3)).make(dtype)
    exact = conv_embed_reference(**{name: x.double() for name, x in tensors.items()}, **options)
    for backend in ("torch", "reference"):
        with ops.backend(backend):
            out = conv_embed(**tensors, **options)
        assert out.dtype == dtype
        # The convolution and the norm each round once.
        assert (out.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["merge", "frames"])
def test_empty_batch(name: str, backend: str) -> None:
    tensors, options = CASES[name].make(torch.float32)
    tensors["x"] = tensors["x"].detach()[:0].requires_grad_()
    with ops.backend(backend):
        got = run(conv_embed, tensors, options)
    assert got["out"].shape == (0, *run(conv_embed, *CASES[name].make(torch.float32))["out"].shape[1:])
    assert got["dx"].shape == tensors["x"].shape and not got["dweight"].any()


@cases
def test_any_strides_and_the_input_is_left_alone(case: Case) -> None:
    tensors, options = case.make(torch.float32)
    turned = {n: x if x is None or x.ndim == 1 else x.detach().mT.contiguous().mT for n, x in tensors.items()}
    before = turned["x"].clone()
    out = conv_embed(**turned, **options)
    assert out.is_contiguous() and torch.equal(turned["x"], before)
    torch.testing.assert_close(out, conv_embed(**tensors, **options))


def test_nan_stays_where_windows_see_it() -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    with torch.no_grad():
        tensors["x"][1, 0, 0, 1] = math.nan
    out = conv_embed(**tensors, **options)
    assert out[1, 0, 0].isnan().all() and out.isnan().sum() == 4


def test_compiles_once_for_every_batch_and_map() -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def embed(x: Tensor) -> Tensor:
        return conv_embed(**{**tensors, "x": x}, **options, eps=1e-5)

    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 7, 9, 3), (5, 8, 6, 3), (7, 12, 15, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), embed(x))
        assert counter.frame_count == 1, f"compiled again for {shape}"


@pytest.mark.parametrize(("name", "backend"), [("merge", "inductor"), ("frames", "aot_eager")])
def test_compiles_in_full(name: str, backend: str) -> None:
    """Not dynamic=True: inductor of torch 2.13 fails to lower the backward of a dynamic 3-D convolution."""
    tensors, options = CASES[name].make(torch.float32)
    compiled = torch.compile(conv_embed, fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(run(compiled, tensors, options), run(conv_embed, tensors, options))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tensors, self.options = CASES["merge"].make(torch.float32)
        self.tensors = nn.ParameterDict({name: x.detach() for name, x in tensors.items() if name != "x"})

    def forward(self, x: Tensor) -> Tensor:
        return conv_embed(x, **{name: self.tensors[name] for name in NAMES[1:]}, **self.options)


def test_export_with_dynamic_sizes() -> None:
    module = Embedding()
    dims = {0: Dim("batch", min=2), 1: Dim("height", min=3), 2: Dim("width", min=3)}
    exported = torch.export.export(module, (torch.randn(2, 6, 9, 3),), dynamic_shapes=(dims,)).module()
    for shape in ((3, 5, 11, 3), (4, 3, 4, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), module(x))


def test_activation_checkpointing() -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    got = run(lambda **kwargs: checkpoint(conv_embed, **kwargs, use_reentrant=False), tensors, options)
    torch.testing.assert_close(got, run(conv_embed, tensors, options))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast(backend: str) -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        out = conv_embed(**tensors, **options)
        doubled = conv_embed(**{name: x.double() for name, x in tensors.items()}, **options)
    assert out.dtype == torch.bfloat16 and doubled.dtype == torch.float64
    torch.testing.assert_close(out.float(), conv_embed(**tensors, **options), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_backends_that_it_lacks_say_so(backend: str) -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    with ops.backend(backend), pytest.raises(RuntimeError, match="kernel for conv_embed in this version"):
        conv_embed(**tensors, **options)
    assert dispatch.choose("conv_embed", **tensors, **options) == "torch"


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(6, 6, 3)}, ValueError, "x must have shape (B, H, W, C) or (B, T, H, W, C), got (6, 6, 3)"),
    ({"x": torch.zeros(2, 6, 0, 3)}, ValueError, "x must have a map of at least one token and one channel"),
    ({"x": torch.zeros(2, 6, 6, 3).long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, "weight must have shape (Cout, 3, kh, kw), got (4, 2, 3, 3)"),
    ({"x": torch.zeros(2, 2, 6, 6, 3)}, ValueError, "weight must have shape (Cout, 3, kt, kh, kw), got (4, 3, 3, 3)"),
    ({"weight": torch.zeros(4, 3, 9, 3)}, ValueError, "the kernel (9, 3) of weight must fit into the map of x"),
    ({"weight": None}, TypeError, "weight must be a floating-point tensor, got NoneType"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must have shape (4,), got (3,)"),
    ({"norm_weight": torch.zeros(3)}, ValueError, "norm_weight must have shape (4,), got (3,)"),
    ({"norm_bias": torch.zeros(4, device="meta")}, ValueError, "norm_bias must be on the device of x, cpu, got meta"),
    ({"stride": 0}, ValueError, "stride must be positive on every axis, got 0"),
    ({"stride": 1.5}, ValueError, "stride must be one int or 2 of them, one per axis of the map, got 1.5"),
    ({"padding": (1, 1, 1)}, ValueError, "padding must be one int or 2 of them"),
    ({"padding": -1}, ValueError, "padding must not be negative, got -1"),
    ({"eps": -1.0}, ValueError, "eps must be a number of at least 0, got -1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, options = CASES["merge"].make(torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        conv_embed(**{**tensors, **options, **change})
