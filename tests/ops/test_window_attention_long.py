"""The Triton kernels of window attention for windows in 3-D, of more than 144 tokens, and by cosines, against the
float64 definition: values, gradients, and what must not depend on luck.

Letters: B batch · T frames · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels import window_attention as launchers
from florence_fast.kernels.targets import Target, assume
from florence_fast.ops.windows import (
    MAX_LOG_SCALE,
    blocked_pairs,
    corner_index,
    crop,
    cut_map,
    merge,
    offset_index,
    partition,
)
from tests.ops.rounding import assert_as_exact, relative_error

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""
FLOOR_OF_LOGIT_SCALE = 2e-5
"""The same for the gradient of ``logit_scale``: one number a head, in which most of the terms cancel."""

# What stands beyond a window's last row is computed and thrown away, and NumPy says of it what a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).* encountered in:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...] | int = 0
    heads: int = 1
    head_dim: int = 16
    batch: int = 1
    pad_mode: str = "mask"
    cyclic: tuple[bool, ...] | bool = False
    term: str = "table"
    cosine: bool = False
    scale: float | None = None

    def make(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw the tensors, which ask for gradients, and give the other arguments."""
        channels, tokens = 3 * self.heads * self.head_dim, math.prod(self.window)
        tensors = {"qkv": torch.randn(self.batch, *self.size, channels).to(dtype)}
        if self.term == "table":
            tensors["rel_pos_bias_table"] = torch.randn(math.prod(2 * w - 1 for w in self.window), self.heads)
        if self.term == "bias":
            tensors["bias"] = torch.randn(self.heads, tokens, tokens)
        if self.pad_mode == "bias":
            tensors["qkv_bias"] = torch.randn(channels).to(dtype)
        if self.cosine:
            # One head beyond the clamp, which passes no gradient.
            tensors["logit_scale"] = torch.tensor([2.3, 4.7, 3.0][: self.heads])
        values = {"window_size": self.window, "num_heads": self.heads, "shift_size": self.shift, "scale": self.scale}
        values |= {"pad_mode": self.pad_mode, "cyclic": self.cyclic}
        return {name: x.to(device).requires_grad_() for name, x in tensors.items()}, values


CASES = {
    "video-exact": Case((2, 5, 8), (2, 5, 4), heads=2),
    "video-shifted": Case((4, 6, 4), (2, 3, 4), (1, 1, 0), batch=2),
    "video-ragged-masked": Case((3, 5, 4), (2, 3, 3), (1, 2, 0), term="bias"),
    "video-ragged-filled": Case((3, 5, 7), (2, 3, 4), (1, 1, 2), heads=2, pad_mode="bias"),
    "video-cyclic-in-time": Case((4, 4, 6), (2, 4, 3), (1, 2, 1), cyclic=(True, False, False)),
    "video-map-shorter": Case((2, 3, 8), (4, 5, 4), (2, 2, 1)),
    "video-map-shorter-whole-bias": Case((2, 3, 4), (3, 4, 2), (1, 1, 0), term="bias"),
    "video-of-one-frame": Case((1, 8, 7), (4, 4, 7), (2, 1, 3), batch=2),
    "frames-apart": Case((3, 6, 4), (1, 3, 4), (0, 1, 2), pad_mode="bias"),
    "window-392": Case((8, 7, 7), (8, 7, 7), head_dim=32, term="bias"),
    "window-16": Case((16, 16), (16, 16), head_dim=32),
    "window-196-shifted": Case((4, 14, 7), (4, 7, 7), (2, 3, 0), term="none"),
    "window-15-ragged-filled": Case((15, 17), (15, 15), (0, 4), pad_mode="bias", term="none"),
    "window-14-shortened-to-7": Case((7, 7), (14, 14), (3, 3)),
    "own-scale-head-dim-64": Case((2, 4, 5), (2, 4, 5), head_dim=64, scale=0.3, term="none"),
    "cosine-7-shifted": Case((7, 14), (7, 7), (0, 3), heads=2, cosine=True),
    "cosine-ragged-filled": Case((5, 6), (4, 4), (2, 1), heads=2, pad_mode="bias", cosine=True),
    "cosine-ragged-masked": Case((5, 6), (4, 4), (2, 1), cosine=True, term="bias"),
    "cosine-150": Case((10, 15), (10, 15), cosine=True, head_dim=32),
    "cosine-video": Case((2, 4, 4), (2, 2, 4), (1, 1, 0), cosine=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def interpretable(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")


def plain(qkv, rel_pos_bias_table=None, bias=None, qkv_bias=None, logit_scale=None, **values: Any) -> Tensor:
    """Attend in the dtype of ``qkv``, step by step as one would write it in PyTorch."""
    heads, axes = values["num_heads"], qkv.ndim - 2
    window, shift, cyclic = (
        x if isinstance(x, tuple) else (x,) * axes
        for x in (values["window_size"], values["shift_size"], values["cyclic"])
    )
    cut = cut_map(qkv.shape[1:-1], window, shift)
    q, k, v = partition(qkv, cut, 3, heads, qkv.dtype, fill=qkv_bias)
    if logit_scale is None:
        scores = q * (q.shape[-1] ** -0.5 if values["scale"] is None else values["scale"]) @ k.mT
    else:
        # The default epsilon is 0 in float16, and a pad has no direction.
        scores = F.normalize(q, dim=-1, eps=1e-6) @ F.normalize(k, dim=-1, eps=1e-6).mT
        scores = scores * logit_scale.clamp(max=MAX_LOG_SCALE).exp().view(-1, 1, 1).to(qkv.dtype)
    if rel_pos_bias_table is not None:
        bias = rel_pos_bias_table[offset_index(cut.window, window, qkv.device)]
        bias = bias.view(cut.num_tokens, cut.num_tokens, heads).permute(2, 0, 1)
    elif bias is not None:
        corner = corner_index(cut.window, window, qkv.device)
        bias = bias[:, corner][:, :, corner]
    if bias is not None:
        scores = scores + bias.to(qkv.dtype)
    blocked = blocked_pairs(cut, cyclic, values["pad_mode"] == "mask", qkv.device)
    if blocked is not None:
        scores = scores.unflatten(0, (-1, cut.num_windows)).masked_fill(blocked[:, None], -math.inf).flatten(0, 1)
    return crop(merge((scores.softmax(-1) @ v)[None], cut, qkv.dtype), cut)


def run(function: Any, tensors: dict[str, Tensor], values: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    """Give the result and every gradient by name."""
    out = function(**tensors, **values)
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype), materialize_grads=True)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.window_attention(**kwargs)


def gradient_of(tensors: dict[str, Tensor], case: Case) -> Tensor:
    """Draw a gradient of the result."""
    qkv = tensors["qkv"]
    return torch.randn(*qkv.shape[:-1], case.heads * case.head_dim, device=qkv.device).to(qkv.dtype)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, values = case.make(dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    grad_out = gradient_of(tensors, case)
    exact = run(ops.window_attention_reference, exact_tensors, values, grad_out.double())
    ours, usual = run(kernels, tensors, values, grad_out), run(plain, tensors, values, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == (dtype if name == "out" else tensors[name[1:]].dtype)
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        floor = FLOOR_OF_LOGIT_SCALE if name == "dlogit_scale" else FLOOR[dtype]
        assert error <= max(allowed, floor), (
            f"window_attention, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    interpretable(dtype, device)
    check(case, dtype, device)


LARGE = {
    "window-24-shifted": Case((48, 24), (24, 24), (12, 0), heads=2, head_dim=32, batch=2),
    "window-784-shifted": Case((32, 14, 7), (16, 7, 7), (8, 3, 0), heads=2, head_dim=32),
    "window-392-ragged-filled": Case((8, 16, 10), (8, 7, 7), (4, 3, 3), heads=2, head_dim=32, pad_mode="bias"),
    "window-16-head-dim-128": Case((32, 32), (16, 16), (8, 8), heads=2, head_dim=128),
    "window-16-cosine": Case((32, 32), (16, 16), (8, 8), heads=3, head_dim=32, cosine=True),
}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_large_windows_on_a_gpu(case: Case, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(case, dtype, "cuda")


@settings(max_examples=6)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    data=st.data(),
)
def test_any_shape(size: tuple[int, ...], window: tuple[int, ...], data: st.DataObject) -> None:
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    cyclic = tuple(data.draw(st.booleans()) for _ in window)
    pad_mode, term = data.draw(st.sampled_from(["mask", "bias"])), data.draw(st.sampled_from(["table", "bias", "none"]))
    cosine, heads = data.draw(st.booleans()), data.draw(st.integers(1, 2))
    check(Case(size, window, shift, heads, 16, 1, pad_mode, cyclic, term, cosine), torch.float32, "cpu")


@pytest.mark.parametrize(
    "case", [Case((3, 7, 6), (3, 7, 4), pad_mode="bias"), Case((9, 14), (9, 14), cosine=True)], ids=["video", "cosine"]
)
def test_every_number_of_programs_gives_the_same_gradients_of_qkv(case: Case) -> None:
    """Few windows are cut into several programs each; what a row or a key gets does not depend on it."""
    tensors, values = case.make(torch.float32, "cpu")
    grad_out = gradient_of(tensors, case)
    whole = run(kernels, tensors, values, grad_out)
    with assume(Target(80, 16)):
        cut = run(kernels, tensors, values, grad_out)
    assert torch.equal(cut["out"], whole["out"]) and torch.equal(cut["dqkv"], whole["dqkv"])
    for name, x in whole.items():
        torch.testing.assert_close(cut[name], x, rtol=1e-4, atol=1e-5)


def test_cosines_are_not_rounded() -> None:
    """At a factor of 100 a q rounded after its division by its norm would be wrong by far more than this."""
    tensors, values = Case((4, 8), (4, 8), term="none", cosine=True).make(torch.float16, "cpu")
    with torch.no_grad():
        tensors["logit_scale"].fill_(4.6)
        tensors["qkv"].mul_(torch.rand(4, 8, 1).add(0.5))
    with torch.no_grad():
        ours = kernels(**tensors, **values).double()
        exact = ops.window_attention_reference(**{n: x.double() for n, x in tensors.items()}, **values)
        usual = plain(**tensors, **values).double()
    assert relative_error(ours, exact) <= 0.2 * relative_error(usual, exact)


def test_a_zero_vector_has_no_direction() -> None:
    tensors, values = Case((4, 4), (4, 4), cosine=True).make(torch.float32, "cpu")
    with torch.no_grad():
        tensors["qkv"][0, 1, 2] = 0
    ours = kernels(**tensors, **values)
    exact = ops.window_attention_reference(**{n: x.double() for n, x in tensors.items()}, **values)
    usual = ops.window_attention_reference(**tensors, **values)
    assert_as_exact(ours, usual, exact)


def test_a_bias_of_minus_infinity_hides(device: str) -> None:
    """The whole first part of a row's keys may be hidden."""
    tensors, values = Case((2, 10, 10), (2, 10, 10), term="bias").make(torch.float32, device)
    with torch.no_grad():
        tensors["bias"][:, 100:, :130] = -math.inf
    grad_out = torch.randn(1, 2, 10, 10, 16, device=device)
    exact = run(ops.window_attention_reference, {n: x.detach().double().requires_grad_() for n, x in tensors.items()},
                values, grad_out.double())  # fmt: skip
    usual = run(ops.window_attention_reference, tensors, values, grad_out)
    for name, x in run(kernels, tensors, values, grad_out).items():
        assert_as_exact(x, usual[name], exact[name], name)


@pytest.mark.parametrize("name", ["video-ragged-filled", "cosine-ragged-filled"])
def test_gradients_alone_and_all_but_one(name: str, device: str) -> None:
    case = replace(CASES[name], heads=1)
    tensors, values = case.make(torch.float32, device)
    grad_out = gradient_of(tensors, case)
    everything = run(kernels, tensors, values, grad_out)
    for count in (1, len(tensors) - 1):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some, **values), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


@pytest.mark.parametrize("name", ["video-ragged-filled", "cosine-ragged-filled"])
def test_gradients_are_bit_equal_over_runs(name: str, device: str) -> None:
    tensors, values = CASES[name].make(torch.float16, device)
    grad_out = gradient_of(tensors, CASES[name])
    first, *others = (run(kernels, tensors, values, grad_out) for _ in range(2))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_strides(device: str) -> None:
    case = CASES["cosine-ragged-filled"]
    tensors, values = case.make(torch.float32, device)
    grad_out = gradient_of(tensors, case)
    expected = run(kernels, tensors, values, grad_out)
    turned = {n: x.detach() if x.ndim < 2 else x.detach().mT.contiguous().mT for n, x in tensors.items()}
    turned["logit_scale"] = torch.stack([turned["logit_scale"]] * 2, 1)[:, 0]
    got = run(kernels, {n: x.requires_grad_() for n, x in turned.items()}, values, grad_out.mT.contiguous().mT)
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


@pytest.mark.parametrize("name", ["video-ragged-filled", "cosine-ragged-filled"])
def test_empty_batch(name: str, device: str) -> None:
    case = replace(CASES[name], batch=0)
    tensors, values = case.make(torch.float32, device)
    got = run(kernels, tensors, values, gradient_of(tensors, case))
    assert got["dqkv"].shape == tensors["qkv"].shape
    assert not any(x.any() for x in got.values())


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_stays_in_its_window_and_is_not_lost(part: int, device: str) -> None:
    case = CASES["video-shifted"]
    tensors, values = case.make(torch.float32, device)
    with torch.no_grad():
        tensors["qkv"][0, 1, 2, 3, part * 16] = math.nan
    ours, exact = (
        run(f, tensors, values, torch.ones(2, 4, 6, 4, 16)) for f in (kernels, ops.window_attention_reference)
    )
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@pytest.mark.parametrize(("name", "kept"), [("video-shifted", 192), ("cosine-7-shifted", 196)])
def test_what_is_kept_and_inference_equals_training(name: str, kept: int, device: str) -> None:
    tensors, values = CASES[name].make(torch.float16, device)
    trained = kernels(**tensors, **values)
    with torch.no_grad():
        assert torch.equal(kernels(**tensors, **values), trained)
    saved = [x for x in trained.grad_fn.saved_tensors if x is not None]
    assert sum(x.numel() for x in saved if all(x is not y for y in tensors.values())) == kept


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool, device: str) -> None:
    case = replace(CASES["video-ragged-filled"], heads=1, cosine=True)
    tensors, _ = case.make(torch.float16, device)
    tensors = {name: x.requires_grad_(train) for name, x in tensors.items()}
    given = [tensors.get(n) for n in ("qkv", "rel_pos_bias_table", "bias", "logit_scale", "qkv_bias")]
    values = (list(case.window), case.heads, list(case.shift), 0.25, "bias", [False] * 3, train, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.florence_fast.window_attention.default, (*given, *values), test_utils=tests)


def test_compiles_in_full(device: str) -> None:
    case = CASES["cosine-ragged-filled"]
    tensors, values = case.make(torch.float32, device)
    grad_out = gradient_of(tensors, case)

    def attend(**tensors: Tensor) -> Tensor:
        return ops.window_attention(**tensors, **values)

    with ops.backend("triton"):
        compiled = torch.compile(attend, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        got = run(compiled, tensors, {}, grad_out)
    expected = run(kernels, tensors, values, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the bias is summed in as many runs as the limit allows, one at least."""
    case = CASES["video-shifted"]
    tensors, values = case.make(torch.float32, "cpu")
    grad_out = gradient_of(tensors, case)
    expected = run(kernels, tensors, values, grad_out)
    monkeypatch.setattr("florence_fast.kernels.window_attention_long_bwd.SCRATCH_BYTES", 1)
    seen = []
    fold = launchers.fold_bias_grad
    monkeypatch.setattr(launchers, "fold_bias_grad", lambda x, *args: seen.append(len(x)) or fold(x, *args))
    got = run(kernels, tensors, values, grad_out)
    assert seen == [1]
    torch.testing.assert_close(got["drel_pos_bias_table"], expected["drel_pos_bias_table"], rtol=1e-5, atol=1e-5)


def test_auto_never_interprets() -> None:
    tensors, values = CASES["video-exact"].make(torch.float32, "cpu")
    assert ops.dispatch.choose("window_attention", **tensors, **values) != "triton"
