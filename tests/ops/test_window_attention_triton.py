"""The Triton kernels of window attention against the float64 definition, through the interpreter on a CPU and on a GPU
where there is one: values, gradients, and what must not depend on luck.

Letters: B batch · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.ops.window_attention import triton as window_attention_triton
from florence_fast.ops.windows import blocked_pairs, crop, cut_map, merge, offset_index, partition
from tests.ops.rounding import relative_error

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""


@dataclass(frozen=True)
class Case:
    """One way to call the op."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    heads: int = 2
    head_dim: int = 16
    batch: int = 2
    pad_mode: str = "mask"
    cyclic: tuple[bool, bool] = (False, False)
    term: str = "table"
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
        values = {"window_size": self.window, "num_heads": self.heads, "shift_size": self.shift, "scale": self.scale}
        values |= {"pad_mode": self.pad_mode, "cyclic": self.cyclic}
        return {name: x.to(device).requires_grad_() for name, x in tensors.items()}, values


CASES = {
    "window-7-exact": Case((14, 14), (7, 7)),
    "window-7-shifted": Case((14, 21), (7, 7), (3, 3), heads=3),
    "window-7-ragged-masked": Case((10, 13), (7, 7), (3, 2), term="bias"),
    "window-7-ragged-filled": Case((10, 16), (7, 7), (3, 3), pad_mode="bias"),
    "pads-in-two-windows-of-an-axis": Case((8, 9), (7, 7), (5, 6), batch=1, pad_mode="bias"),
    "window-8-columns-cyclic": Case((16, 16), (8, 8), (4, 4), cyclic=(False, True)),
    "not-square-both-cyclic-filled": Case((9, 11), (4, 3), (1, 2), pad_mode="bias", cyclic=(True, True), term="none"),
    "map-shorter-than-window": Case((5, 20), (7, 7), (3, 3)),
    "map-smaller-whole-bias": Case((3, 2), (7, 7), (3, 3), term="bias"),
    "one-token": Case((1, 1), (7, 7), (3, 3), batch=1),
    "head-dim-32-one-head": Case((7, 14), (7, 7), heads=1, head_dim=32),
    "window-12-exact": Case((12, 12), (12, 12), batch=1),
    "window-12-shifted-head-dim-32": Case((24, 12), (12, 12), (6, 6), heads=1, head_dim=32, batch=1),
    "window-12-ragged-filled": Case((20, 17), (12, 12), (5, 6), heads=1, batch=1, pad_mode="bias"),
    "window-12-shortened-to-108-tokens": Case((9, 13), (12, 12), (6, 6), heads=1, batch=1, term="bias"),
    "over-128-tokens-with-pad-rows": Case((13, 24), (13, 11), (2, 3), heads=1, batch=1),
    "head-dim-64-own-scale": Case((8, 16), (8, 8), (4, 4), head_dim=64, scale=0.3, batch=1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def interpretable(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")


def plain(qkv: Tensor, table: Tensor | None, bias: Tensor | None, fill: Tensor | None, values: dict) -> Tensor:
    """Attend in the dtype of ``qkv``, step by step as one would write it in PyTorch."""
    heads, window = values["num_heads"], values["window_size"]
    cut = cut_map(qkv.shape[1:3], window, values["shift_size"])
    q, k, v = partition(qkv, cut, 3, heads, qkv.dtype, fill=fill)
    scores = q * (q.shape[-1] ** -0.5 if values["scale"] is None else values["scale"]) @ k.mT
    if table is not None:
        bias = table[offset_index(cut.window, window, qkv.device)].view(cut.num_tokens, cut.num_tokens, heads)
        bias = bias.permute(2, 0, 1)
    elif bias is not None:
        bias = bias.view(heads, *window, *window)[:, : cut.window[0], : cut.window[1], : cut.window[0], : cut.window[1]]
        bias = bias.reshape(heads, cut.num_tokens, cut.num_tokens)
    if bias is not None:
        scores = scores + bias.to(qkv.dtype)
    blocked = blocked_pairs(cut, values["cyclic"], values["pad_mode"] == "mask", qkv.device)
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


def plainly(qkv, rel_pos_bias_table=None, bias=None, qkv_bias=None, **values) -> Tensor:
    return plain(qkv, rel_pos_bias_table, bias, qkv_bias, values)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, values = case.make(dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    grad_out = torch.randn(*tensors["qkv"].shape[:-1], case.heads * case.head_dim, device=device).to(dtype)
    exact = run(ops.window_attention_reference, exact_tensors, values, grad_out.double())
    ours, usual = run(kernels, tensors, values, grad_out), run(plainly, tensors, values, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == (dtype if name == "out" else tensors[name[1:]].dtype)
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= max(allowed, FLOOR[dtype]), (
            f"window_attention, {name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    interpretable(dtype, device)
    check(case, dtype, device)


@pytest.mark.parametrize("name", ["window-7-shifted", "window-7-ragged-filled", "window-12-ragged-filled"])
def test_the_form_that_is_safe_on_hopper(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention_triton, "needs_safe_dots", lambda *_: True)
    check(CASES[name], torch.float32, device)


def test_the_self_test_tells_right_from_wrong(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.device(device), torch.float16, False, [7, 7], [3, 3], 32)
    assert window_attention_triton.fast_dots_are_right(*arguments)
    right = window_attention_triton.kernels.window_attention_bwd

    def wrong(*args: Any, **kwargs: Any) -> tuple:
        dqkv, *rest = right(*args, **kwargs)
        return dqkv.roll(16, 1), *rest

    monkeypatch.setattr(window_attention_triton.kernels, "window_attention_bwd", wrong)
    assert not window_attention_triton.fast_dots_are_right(*arguments)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    data=st.data(),
)
def test_any_shape(size: tuple[int, int], window: tuple[int, int], data: st.DataObject) -> None:
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    cyclic = tuple(data.draw(st.booleans()) for _ in window)
    pad_mode, term = data.draw(st.sampled_from(["mask", "bias"])), data.draw(st.sampled_from(["table", "bias", "none"]))
    heads, batch = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    check(Case(size, window, shift, heads, 16, batch, pad_mode, cyclic, term), torch.float32, "cpu")


@pytest.mark.parametrize("window", [(7, 7), (13, 11)], ids=str)
def test_rows_beyond_the_window_stay_silent(window: tuple[int, int], device: str) -> None:
    """Blocks of rows hold more rows than a window has; what pads hold must not reach those."""
    case = Case((2 * window[0], window[1] + 2), window, heads=1, batch=1, pad_mode="bias")
    tensors, values = case.make(torch.float16, device)
    with torch.no_grad():
        tensors["qkv_bias"].mul_(30)
    grad_out = torch.randn_like(tensors["qkv"][..., : tensors["qkv"].shape[-1] // 3])
    assert all(x.isfinite().all() for x in run(kernels, tensors, values, grad_out).values())


@pytest.mark.parametrize("name", ["window-7-ragged-filled", "window-7-ragged-masked"])
def test_every_subset_of_gradients(name: str, device: str) -> None:
    tensors, values = replace(CASES[name], batch=1, heads=1).make(torch.float32, device)
    grad_out = torch.randn_like(ops.window_attention_reference(**tensors, **values))
    everything = run(kernels, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some, **values), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


@pytest.mark.parametrize("name", ["window-7-ragged-filled", "window-12-shifted-head-dim-32"])
def test_gradients_are_bit_equal_over_runs(name: str, device: str) -> None:
    tensors, values = CASES[name].make(torch.float16, device)
    grad_out = torch.randn_like(tensors["qkv"][..., : tensors["qkv"].shape[-1] // 3])
    first, *others = (run(kernels, tensors, values, grad_out) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_strides(device: str) -> None:
    tensors, values = CASES["window-7-shifted"].make(torch.float32, device)
    grad_out = torch.randn_like(tensors["qkv"][..., : tensors["qkv"].shape[-1] // 3])
    expected = run(kernels, tensors, values, grad_out)
    turned = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in tensors.items()}
    got = run(kernels, turned, values, grad_out.mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in turned.values())
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_empty_batch(device: str) -> None:
    tensors, values = replace(CASES["window-7-ragged-filled"], batch=0).make(torch.float32, device)
    grad_out = torch.randn_like(tensors["qkv"][..., : tensors["qkv"].shape[-1] // 3])
    got = run(kernels, tensors, values, grad_out)
    assert got["out"].shape == grad_out.shape and got["dqkv"].shape == tensors["qkv"].shape
    assert not got["drel_pos_bias_table"].any() and not got["dqkv_bias"].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_stays_in_its_window_and_is_not_lost(part: int, device: str) -> None:
    tensors, values = CASES["window-7-shifted"].make(torch.float32, device)
    with torch.no_grad():
        tensors["qkv"][0, 4, 5, part * 48] = math.nan
    grad_out = torch.randn_like(tensors["qkv"][..., :48])
    ours, exact = (run(f, tensors, values, grad_out) for f in (kernels, ops.window_attention_reference))
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@pytest.mark.parametrize(("name", "kept"), [("window-7-shifted", 0), ("window-12-exact", 2 * 144)])
def test_what_is_kept_and_inference_equals_training(name: str, kept: int, device: str) -> None:
    tensors, values = CASES[name].make(torch.float16, device)
    trained = kernels(**tensors, **values)
    with torch.no_grad():
        assert torch.equal(kernels(**tensors, **values), trained)
    saved = [x for x in trained.grad_fn.saved_tensors if x is not None]
    assert sum(x.numel() for x in saved if all(x is not y for y in tensors.values())) == kept


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["pads-in-two-windows-of-an-axis", "window-12-ragged-filled"])
def test_opcheck(name: str, train: bool, device: str) -> None:
    case = CASES[name]
    tensors, _ = case.make(torch.float16, device)
    tensors = {name: x.requires_grad_(train) for name, x in tensors.items()}
    values = (list(case.window), case.heads, list(case.shift), 0.25, "bias", [False, False], train, "triton")
    arguments = (tensors["qkv"], tensors["rel_pos_bias_table"], None, None, tensors["qkv_bias"], *values)
    torch.library.opcheck(torch.ops.florence_fast.window_attention.default, arguments)


def test_compiles_in_full(device: str) -> None:
    tensors, values = CASES["window-7-shifted"].make(torch.float32, device)
    grad_out = torch.randn_like(tensors["qkv"][..., : tensors["qkv"].shape[-1] // 3])

    def attend(**tensors: Tensor) -> Tensor:
        return ops.window_attention(**tensors, **values)

    with ops.backend("triton"):
        compiled = torch.compile(attend, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        got = run(compiled, tensors, {}, grad_out)
    expected = run(kernels, tensors, values, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


REFUSED = [
    ({"head_dim": 24}, r"the head dim must be one of \(16, 32, 64, 128\), got 24"),
    ({"window": (29, 29)}, "tokens a window, got 841"),
    ({"window": (2, 150)}, "144 tokens on an axis, got 150"),
    ({"scale": 0.0}, "scale, which must be at least 0.0009765625"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason[:32] for _, reason in REFUSED])
def test_what_it_cannot_do_it_refuses_with_the_reason(change: dict, reason: str) -> None:
    tensors, values = replace(CASES["window-7-exact"], **change).make(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=reason):
        kernels(**tensors, **values)
    assert ops.window_attention(**tensors, **values).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_that_the_interpreter_cannot_do(dtype: torch.dtype) -> None:
    tensors, values = CASES["window-7-exact"].make(dtype, "cpu")
    with pytest.raises(RuntimeError, match="float"):
        kernels(**tensors, **values)


def test_auto_never_interprets() -> None:
    tensors, values = CASES["window-7-exact"].make(torch.float32, "cpu")
    assert ops.dispatch.choose("window_attention", **tensors, **values) != "triton"
