"""The Triton kernels of layer_norm against the float64 definition, through the interpreter on a CPU and on a GPU where
there is one: values, gradients, and what must not depend on luck.

Letters: B samples · C channels.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels import layer_norm as kernels_file
from florence_fast.kernels.configs import Config
from tests.ops.rounding import assert_as_exact, relative_error

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    shape: tuple[int, ...]
    residual: bool = False
    scale: bool = False
    weight: bool = True
    bias: bool = True
    offset: float = 1.0
    eps: float = 1e-5

    def make(self, dtype: torch.dtype, device: str, weights: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Draw the tensors, which ask for gradients but for the factors."""
        channels = self.shape[-1:]
        tensors = {"x": (torch.randn(self.shape) * 2 + self.offset).to(dtype)}
        if self.weight:
            tensors["weight"] = torch.randn(channels).to(weights)
        if self.bias:
            tensors["bias"] = torch.randn(channels).to(weights)
        if self.residual:
            tensors["residual"] = torch.randn(self.shape).to(dtype)
        tensors = {name: x.to(device).requires_grad_() for name, x in tensors.items()}
        if self.scale:
            factors = (torch.arange(self.shape[0]) % 3 != 1) * torch.tensor(1 / 0.9)
            tensors["residual_scale"] = factors.to(device)
        return tensors


CASES = {
    "width-96": Case((2, 7, 7, 96)),
    "width-96-drop-path": Case((2, 7, 7, 96), residual=True, scale=True),
    "width-128-exact": Case((3, 20, 128), residual=True),
    "samples-shorter-than-a-block": Case((19, 3, 64), residual=True, scale=True),
    "one-row-a-sample": Case((37, 48), residual=True, scale=True),
    "ragged-rows-and-channels": Case((3, 11, 37), residual=True, scale=True),
    "one-channel": Case((130, 1), residual=True, scale=True),
    "no-weight": Case((2, 9, 24), weight=False),
    "no-bias": Case((2, 9, 24), bias=False, residual=True),
    "bare": Case((5, 24), weight=False, bias=False, residual=True, scale=True),
    "longer-than-a-block": Case((3, 5000), residual=True, scale=True),
    "longest": Case((2, 8192)),
    "mean-beyond-the-spread": Case((4, 9, 96), offset=40.0),
    "one-row": Case((200,)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def interpretable(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter cuts values off where they become bfloat16")


def kernels(**kwargs: Any) -> Any:
    with ops.backend("triton"):
        return ops.layer_norm(**kwargs)


def plainly(x, weight=None, bias=None, residual=None, residual_scale=None, eps=1e-5):
    """Write it as one would in PyTorch, every step in the dtype of ``x``."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if residual_scale is not None:
        x = x * residual_scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return residual + x, F.layer_norm(residual + x, x.shape[-1:], weight, bias, eps)


def run(function: Any, tensors: dict[str, Tensor], grads_out: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Give the results and every gradient by name."""
    outs = function(**tensors, **options)
    outs = dict(zip(("sum", "norm"), outs, strict=True)) if isinstance(outs, tuple) else {"norm": outs}
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    grads_out = [g.to(y.dtype) for g, y in zip(grads_out, outs.values(), strict=True)]
    grads = torch.autograd.grad(list(outs.values()), list(wanted.values()), grads_out)
    return {n: y.detach() for n, y in outs.items()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def grads_for(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(case.shape, device=device).to(dtype) for _ in range(1 + case.residual)]


def check(case: Case, dtype: torch.dtype, device: str, weights: torch.dtype = torch.float32) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, grads_out = case.make(dtype, device, weights), grads_for(case, dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    exact = run(ops.layer_norm_reference, exact_tensors, [g.double() for g in grads_out], eps=case.eps)
    ours, usual = (run(f, tensors, grads_out, eps=case.eps) for f in (kernels, plainly))
    for name, x in exact.items():
        is_result = name in ("sum", "norm")
        assert ours[name].dtype == (dtype if is_result else tensors[name[1:]].dtype), name
        error, allowed = relative_error(ours[name], x), (2 if is_result else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        # A single channel is its own mean: its norm and the gradient through it are zeros, or rounding.
        assert error <= max(allowed, FLOOR[dtype]) or abs(got - wanted) < 1e-6, (
            f"layer_norm, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    interpretable(dtype, device)
    check(case, dtype, device)


def test_weights_of_16_bits(device: str) -> None:
    check(CASES["width-96-drop-path"], torch.float16, device, weights=torch.float16)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    channels=st.integers(1, 300),
    flags=st.tuples(*[st.booleans()] * 4),
    rows_of_a_block=st.sampled_from([256, 2048]),
)
def test_any_shape(shape: list[int], channels: int, flags: tuple[bool, ...], rows_of_a_block: int) -> None:
    residual, scale, weight, bias = flags
    check(Case((*shape, channels), residual, residual and scale, weight, bias), torch.float32, "cpu")


def test_eps_counts(device: str) -> None:
    check(replace(CASES["width-96"], eps=3.0), torch.float32, device)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", ["width-96", "width-96-drop-path"])
def test_rows_that_do_not_exist_add_nothing_to_the_weights(name: str, device: str) -> None:
    """Without eps a row of zeros has no norm: 5 rows of a block of 32 exist, and the others must not be summed."""
    case = replace(CASES[name], shape=(1, 5, 96), eps=0.0)
    check(case, torch.float32, device)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_more_or_fewer_programs_than_blocks(programs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_file.RowCall, "programs", programs)
    check(Case((3, 50, 64), residual=True, scale=True), torch.float32, device)


def test_long_rows_are_spread_over_more_warps_and_fewer_programs() -> None:
    def call(channels: int) -> kernels_file.RowCall:
        return kernels_file.RowCall(torch.empty(64, channels), "layer_norm_bwd", 4096, Config(4, 1, 8))

    assert [
        (call(c).shape, call(c).config.num_warps, call(c).config.programs_per_sm) for c in (96, 768, 3000, 8192)
    ] == [
        ((96, 32, 128), 4, 8),
        ((768, 4, 1024), 4, 8),
        ((3000, 1, 4096), 8, 4),
        ((8192, 1, 8192), 16, 2),
    ]


def test_every_subset_of_gradients(device: str) -> None:
    case = Case((3, 9, 40), residual=True, scale=True)
    tensors, grads_out = case.make(torch.float32, device), grads_for(case, torch.float32, device)
    everything = run(kernels, tensors, grads_out)
    names = [name for name, x in tensors.items() if x.requires_grad]
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            for name, x in run(kernels, some, grads_out).items():
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_of_the_two_results_is_enough(used: str, device: str) -> None:
    case = Case((3, 9, 40), residual=True, scale=True)
    tensors = case.make(torch.float32, device)
    names = [name for name, x in tensors.items() if x.requires_grad]
    grads = []
    for function in (kernels, ops.layer_norm_reference):
        out = dict(zip(("sum", "norm"), function(**tensors), strict=True))[used].square().sum()
        grads.append(torch.autograd.grad(out, [tensors[n] for n in names], materialize_grads=True))
    torch.testing.assert_close(*grads)


def test_a_float32_stream_beside_a_16_bit_branch(device: str) -> None:
    case = Case((3, 9, 40), residual=True, scale=True)
    tensors = case.make(torch.float16, device)
    tensors["residual"] = tensors["residual"].detach().float().requires_grad_()
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in tensors.items()}
    grads_out = grads_for(case, torch.float32, device)
    got, wanted = run(kernels, tensors, grads_out), run(ops.layer_norm_reference, exact, grads_out)
    usual = run(plainly, {n: x.detach().float().requires_grad_(x.requires_grad) for n, x in tensors.items()}, grads_out)
    assert got["sum"].dtype == got["norm"].dtype == got["dresidual"].dtype == torch.float32
    assert got["dx"].dtype == torch.float16
    for name, x in wanted.items():
        assert_as_exact(got[name], usual[name], x, name)


def test_a_norm_of_another_dtype_than_the_sum(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's autocast asks for: 16-bit in, a float32 norm out."""
    monkeypatch.setattr(ops.dispatch, "float32_autocast_dtype", lambda *_: torch.float32)
    tensors = Case((3, 9, 40), residual=True).make(torch.float16, device)
    total, norm = kernels(**tensors)
    assert (total.dtype, norm.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(norm, F.layer_norm(total.float(), (40,), tensors["weight"], tensors["bias"]))
    (dx,) = torch.autograd.grad(norm.square().sum(), tensors["x"])
    (wanted,) = torch.autograd.grad(ops.layer_norm_reference(**tensors)[1].square().sum(), tensors["x"])
    assert dx.dtype == torch.float16
    torch.testing.assert_close(dx, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["width-96-drop-path", "ragged-rows-and-channels"])
def test_gradients_are_bit_equal_over_runs(name: str, device: str) -> None:
    tensors = CASES[name].make(torch.float16, device)
    grads_out = grads_for(CASES[name], torch.float16, device)
    first, *others = (run(kernels, tensors, grads_out) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_strides(device: str) -> None:
    case = Case((3, 9, 40), residual=True, scale=True)
    tensors, grads_out = case.make(torch.float32, device), grads_for(case, torch.float32, device)
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for n, x in tensors.items()}
    expected, got = run(kernels, tensors, grads_out), run(kernels, turned, [g.mT.contiguous().mT for g in grads_out])
    assert not turned["x"].is_contiguous()
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_no_rows(device: str) -> None:
    case = Case((0, 9, 40), residual=True, scale=True)
    got = run(kernels, case.make(torch.float32, device), grads_for(case, torch.float32, device))
    assert all(got[name].shape == case.shape for name in ("sum", "norm", "dx", "dresidual"))
    assert not got["dweight"].any() and not got["dbias"].any()


def test_nan_stays_in_its_row_and_is_not_lost(device: str) -> None:
    case = CASES["width-96-drop-path"]
    tensors, grads_out = case.make(torch.float32, device), grads_for(case, torch.float32, device)
    with torch.no_grad():
        tensors["x"][1, 2, 3, 4] = torch.nan  # of a sample that drop path leaves out: zero times NaN
    ours, exact = (run(f, tensors, grads_out) for f in (kernels, ops.layer_norm_reference))
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


def test_nothing_is_kept_but_the_sum(device: str) -> None:
    tensors = CASES["width-96-drop-path"].make(torch.float16, device)
    total, norm = kernels(**tensors)
    with torch.no_grad():
        assert all(map(torch.equal, kernels(**tensors), (total, norm)))
    given = [total, *(tensors[name] for name in ("weight", "bias", "residual_scale"))]
    saved = [x for x in norm.grad_fn.saved_tensors if x is not None]
    assert sum(x.numel() for x in saved if all(x.data_ptr() != y.data_ptr() for y in given)) == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["width-96", "width-96-drop-path"])
def test_opcheck(name: str, train: bool, device: str) -> None:
    tensors = {n: x if train else x.detach() for n, x in CASES[name].make(torch.float16, device).items()}
    names = ("x", "residual", "residual_scale", "weight", "bias")
    arguments = (*(tensors.get(n) for n in names), 1e-5, torch.float16, torch.float16, "triton")
    torch.library.opcheck(torch.ops.florence_fast.layer_norm.default, arguments)


def test_compiles_in_full(device: str) -> None:
    case = CASES["width-96-drop-path"]
    tensors, grads_out = case.make(torch.float32, device), grads_for(case, torch.float32, device)
    expected = run(kernels, tensors, grads_out)
    with ops.backend("triton"):
        compiled = torch.compile(
            ops.layer_norm, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
        )
        got = run(compiled, tensors, grads_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


REFUSED = [
    (Case((2, 8193)), torch.float32, "rows of at most 8192 elements, got 8193"),
    (Case((2, 8)), torch.float64, "must be float16, bfloat16 or float32, got torch.float64"),
    (Case((2, 8)), torch.bfloat16, "interpreter cuts values off"),
]


@pytest.mark.parametrize(("case", "dtype", "reason"), REFUSED, ids=[reason[:32] for *_, reason in REFUSED])
def test_what_it_cannot_do_it_refuses_with_the_reason(case: Case, dtype: torch.dtype, reason: str) -> None:
    tensors = case.make(dtype, "cpu")
    with pytest.raises(RuntimeError, match=reason):
        kernels(**tensors)
    assert ops.layer_norm(**tensors).isfinite().all()


def test_auto_never_interprets() -> None:
    assert ops.dispatch.choose("layer_norm", torch.randn(2, 8)) != "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GiB")
def test_rows_beyond_two_to_the_31_elements() -> None:
    x = torch.zeros(2**31 // 1024 + 5, 1024, dtype=torch.float16, device="cuda")
    x[-5:] = torch.randn(5, 1024, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(kernels(x=x)[-5:], F.layer_norm(x[-5:], (1024,)))
