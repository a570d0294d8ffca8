"""The Triton kernels of attention in windows that are cut out already against the float64 definition, through the
interpreter on a CPU and on a GPU where there is one: values, gradients, and what must not depend on luck.

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from florence_fast import ops
from florence_fast.kernels import window_attention_partitioned as launchers
from florence_fast.kernels.targets import Target, assume
from florence_fast.ops.window_attention_partitioned import (
    window_attention_partitioned,
    window_attention_partitioned_reference,
)
from tests.ops.rounding import assert_as_exact, relative_error
from tests.ops.test_window_attention_partitioned import attend, make, run

FLOOR = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Errors below this are rounding in whatever order, and are not compared."""


@dataclass(frozen=True)
class Case:
    """One way to call the op: ``shape`` is (B*M, h, N, d), M being 3 where there is a mask."""

    shape: tuple[int, int, int, int]
    biased: bool = True
    masked: str = "added"
    scale: float | None = None

    def make(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        tensors = make(dtype, self.biased, self.masked, self.shape)
        return {n: x.detach().to(device).requires_grad_(x.is_floating_point()) for n, x in tensors.items()}


CASES = {
    "49-two-maps": Case((6, 2, 49, 32)),
    "64-one-whole-tile": Case((3, 1, 64, 32), masked="bool"),
    "16-nothing-added": Case((5, 1, 16, 16), biased=False, masked="none"),
    "9-small-heads": Case((6, 2, 9, 8), biased=False),
    "20-own-scale": Case((3, 2, 20, 24), masked="bool", scale=-0.3),
    "17-widest-head": Case((3, 1, 17, 128)),
    "144": Case((1, 1, 144, 32), masked="none"),
    "100-ragged": Case((3, 1, 100, 24), masked="bool"),
    "96-whole-columns": Case((3, 1, 96, 16)),
    "65-nothing-added": Case((1, 1, 65, 64), biased=False, masked="none"),
}


def exact_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: x if x.dtype == torch.bool else x.detach().double().requires_grad_(x.requires_grad)
        for n, x in tensors.items()
    }


def grad_like(q: Tensor) -> Tensor:
    return torch.randn(q.shape, dtype=torch.float64).to(q)


def plainly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Do what Swin's code does: two products with a softmax between, all in the dtype of q."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return scores.softmax(-1) @ v


def run_plainly(tensors: dict[str, Tensor], grad_out: Tensor, **values: Any) -> dict[str, Tensor]:
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    out = plainly(**tensors, **values)
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, values = case.make(dtype, device), {"scale": case.scale}
    compare(tensors, grad_like(tensors["q"]), values, str(case))


def compare(tensors: dict[str, Tensor], grad_out: Tensor, values: dict[str, Any], what: str) -> None:
    exact = run("reference", exact_of(tensors), grad_out.double(), **values)
    ours, usual = run("triton", tensors, grad_out, **values), run_plainly(tensors, grad_out, **values)
    for name, x in exact.items():
        wanted = tensors["q"].dtype if name == "out" else tensors[name[1:]].dtype
        assert ours[name].dtype == wanted and ours[name].shape == x.shape
        error, allowed = relative_error(ours[name], x), (2 if name == "out" else 3) * relative_error(usual[name], x)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, right = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= max(allowed, FLOOR[grad_out.dtype]), (
            f"window_attention_partitioned, {name}, {grad_out.dtype}, {what}: {error:.2e}, plain PyTorch allows "
            f"{allowed:.2e}; worst at {worst}: {got} instead of {right}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    check(case, dtype, device)


@settings(max_examples=5)
@given(
    maps=st.integers(1, 2),
    heads=st.integers(1, 2),
    tokens=st.sampled_from([1, 2, 15, 31, 33, 63]),
    head_dim=st.integers(1, 40),
    biased=st.booleans(),
    masked=st.sampled_from(["none", "bool", "added"]),
)
def test_any_shape(maps: int, heads: int, tokens: int, head_dim: int, biased: bool, masked: str) -> None:
    check(Case((3 * maps, heads, tokens, head_dim), biased, masked), torch.float32, "cpu")


@pytest.mark.parametrize(("num_sms", "shape"), [(1, (6, 1, 9, 16)), (3, (6, 1, 9, 16)), (40, (6, 1, 65, 16))])
def test_any_number_of_runs(num_sms: int, shape: tuple[int, ...], poisoned_memory: None) -> None:
    """A run may hold several masks or a part of one."""
    with assume(Target(80, num_sms)):
        check(Case(shape), torch.float16, "cpu")


@pytest.mark.parametrize("tokens", [20, 70])
def test_values_far_from_zero(tokens: int, device: str) -> None:
    """Where p dp and delta sum p are large and nearly the same, their difference is dq."""
    tensors = Case((3, 1, tokens, 16)).make(torch.float16, device)
    with torch.no_grad():
        tensors["v"] += 8
    compare(tensors, grad_like(tensors["q"]), {}, f"{tokens} tokens")


def check_subsets(shape: tuple[int, ...], subsets: Iterable[tuple[str, ...]], device: str) -> None:
    tensors = Case(shape).make(torch.float16, device)
    grad_out = grad_like(tensors["q"])
    everything = run("triton", tensors, grad_out)
    for subset in subsets:
        some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
        for name, x in run("triton", some, grad_out).items():
            if name == "dbias" and "mask" not in subset:  # summed over other runs
                torch.testing.assert_close(x, everything[name], rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(x, everything[name]), f"{name} when only {subset} are asked for"


def test_every_subset_of_gradients(device: str) -> None:
    names = ("q", "k", "v", "bias", "mask")
    subsets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(1, 5))
    check_subsets((3, 1, 9, 8), subsets, device)


def test_subsets_that_spare_launches(device: str) -> None:
    check_subsets((3, 1, 65, 8), [("q", "mask"), ("v",), ("k", "bias")], device)


@pytest.mark.parametrize("shape", [(6, 2, 9, 8), (3, 1, 65, 16)], ids=str)
def test_gradients_are_bit_equal_over_runs(shape: tuple[int, ...], device: str) -> None:
    tensors = Case(shape).make(torch.float16, device)
    grad_out = grad_like(tensors["q"])
    first, second = (run("triton", tensors, grad_out) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def packed(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """Give qkv (B*M, N, 3, h, d) as a linear layer writes it, and q, k and v in it."""
    windows, heads, tokens, head_dim = shape
    qkv = torch.randn(windows, tokens, 3, heads, head_dim, device=device).to(dtype).requires_grad_()
    return qkv, [x.transpose(1, 2) for x in qkv.unbind(2)]


@pytest.mark.parametrize("case", [Case((3, 2, 9, 8)), Case((1, 2, 65, 16), masked="none")], ids=str)
def test_strides(case: Case, device: str) -> None:
    shape = case.shape
    rest = {n: x for n, x in case.make(torch.float16, device).items() if n in ("bias", "mask")}
    qkv, (q, k, v) = packed(shape, torch.float16, device)
    grad_out = grad_like(q).mT.contiguous().mT
    whole = {n: x.detach().contiguous().requires_grad_() for n, x in {"q": q, "k": k, "v": v}.items()}
    expected = run("triton", whole | rest, grad_out)
    turned = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in (whole | rest).items()}
    apart = torch.cat((v, v), -1).detach()[..., : v.shape[-1]]
    mixed = {"q": whole["q"], "k": k.detach().requires_grad_(), "v": apart.requires_grad_(), **rest}
    for tensors in (turned, mixed):
        for name, x in run("triton", tensors, grad_out).items():
            assert torch.equal(x, expected[name]), name
    out = attend("triton", q=q, k=k, v=v, **rest)
    assert torch.equal(out, expected["out"])
    (dqkv,) = torch.autograd.grad(out, qkv, grad_out)
    for part, name in zip(dqkv.unbind(2), "qkv", strict=True):
        assert torch.equal(part.transpose(1, 2), expected[f"d{name}"]), f"d{name}"


class Copies(TorchDispatchMode):
    """Record what copies memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.seen.append(f"{func} of {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def test_parts_of_a_packed_tensor_cost_no_copy() -> None:
    parts = [x.detach() for x in packed((3, 2, 9, 8), torch.float32, "cpu")[1]]
    turned = [x.mT.contiguous().mT for x in parts]
    counts = []
    for q, k, v in (parts, turned):
        with Copies() as recorder:
            launchers.window_attention_partitioned_fwd(q, k, v, None, None, 0.3, False)
        counts.append(len([text for text in recorder.seen if text.endswith("(3, 2, 9, 8)")]))
    assert counts == [0, 3]


def test_no_windows(device: str) -> None:
    for masked in ("added", "none"):
        tensors = Case((0, 2, 9, 8), masked=masked).make(torch.float32, device)
        found = run("triton", tensors, torch.zeros(0, 2, 9, 8, device=device))
        assert found["out"].shape == (0, 2, 9, 8) == found["dq"].shape
        for name, x in found.items():
            assert x.shape == (tensors["q"] if name == "out" else tensors[name[1:]]).shape and not x.any()


def test_keeps_a_number_a_row_for_training_and_nothing_else() -> None:
    tensors = Case((3, 2, 9, 8)).make(torch.float32)
    given = [tensors[n].detach() for n in ("q", "k", "v", "bias", "mask")]
    forward = torch.ops.florence_fast.window_attention_partitioned.default
    _, kept = forward(*given, 0.3, True, "triton")
    scores = 0.3 * given[0] @ given[1].mT + given[3] + given[4][:, None]
    torch.testing.assert_close(kept * math.log(2), scores.logsumexp(-1))
    assert forward(*given, 0.3, False, "triton")[1].numel() == 0


@pytest.mark.filterwarnings("ignore:divide by zero encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("kind", ["bool", "-inf", "least"])
@pytest.mark.parametrize("tokens", [9, 70])
def test_hidden_keys(tokens: int, kind: str, device: str) -> None:
    """Row 1 sees the last key alone, past tiles in which it sees none; row 2 sees none, which gives NaN from -inf."""
    tensors = Case((3, 1, tokens, 8)).make(torch.float32, device)
    allowed = torch.ones(3, tokens, tokens, dtype=torch.bool, device=device)
    allowed[:, 1, :-1] = allowed[1, 2] = False
    least = torch.finfo(torch.float32).min if kind == "least" else -math.inf
    tensors["mask"] = allowed if kind == "bool" else torch.zeros_like(allowed, dtype=torch.float32)
    if kind != "bool":
        tensors["mask"].masked_fill_(~allowed, least)
    with torch.no_grad():
        ours, exact = attend("triton", **tensors), attend("reference", **exact_of(tensors))
        usual = attend("reference", **tensors)
    assert torch.equal(ours.isnan().any(-1).any(1), exact.isnan().any(-1).any(1))
    assert exact[1, 0, 2].isnan().all() == (kind != "least") and exact[:, 0, 1].isfinite().all()
    seen = exact.isfinite() & torch.ones_like(exact, dtype=torch.bool)
    assert_as_exact(ours[:, :, 1], usual[:, :, 1], exact[:, :, 1])
    if kind != "least":  # all its keys hidden by the same finite number: the scores are lost in float32's rounding
        assert_as_exact(ours[seen], usual[seen], exact[seen])
    assert ours[seen].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [9, 65])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_nan_is_not_lost_and_reaches_nothing_else(name: str, tokens: int, value: float, device: str) -> None:
    tensors = Case((1, 2, tokens, 8), masked="none").make(torch.float16, device)
    with torch.no_grad():
        tensors[name].view(-1, tokens, tensors[name].shape[-1])[1, 3, 4] = value
    grad_out = grad_like(tensors["q"])
    ours, exact = (run(backend, tensors, grad_out) for backend in ("triton", "torch"))
    for key, x in exact.items():
        assert torch.equal(ours[key].isfinite(), x.isfinite()), key
    assert not exact["out"].isfinite().all() and exact["out"].isfinite().any()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", [Case((3, 1, 9, 8)), Case((1, 1, 33, 40), False, "none")], ids=str)
def test_opcheck(case: Case, train: bool, device: str) -> None:
    tensors = {n: x.requires_grad_(train) for n, x in case.make(torch.float32, device).items()}
    given = [tensors.get(n) for n in ("q", "k", "v", "bias", "mask")]
    torch.library.opcheck(torch.ops.florence_fast.window_attention_partitioned.default, (*given, 0.3, train, "triton"))


def test_compiles_in_full(device: str) -> None:
    tensors = Case((6, 2, 9, 8)).make(torch.float32, device)
    grad_out = grad_like(tensors["q"])
    with ops.backend("triton"):
        backend = "inductor" if device == "cuda" else "aot_eager"
        compiled = torch.compile(window_attention_partitioned, fullgraph=True, backend=backend)
        out = compiled(**tensors)
        grads = torch.autograd.grad(out, list(tensors.values()), grad_out)
    expected = run("triton", tensors, grad_out)
    for x, wanted in zip((out, *grads), expected.values(), strict=True):
        assert torch.equal(x, wanted)


def test_autocast(device: str) -> None:
    tensors = Case((3, 2, 9, 8)).make(torch.float32, device)
    with torch.autocast(device, torch.float16):
        ours = attend("triton", **tensors)
    with torch.no_grad():
        wanted = window_attention_partitioned_reference(
            **{n: x.half() if n in "qkv" else x for n, x in tensors.items()}
        )
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=2e-3)


q = torch.zeros(3, 1, 9, 8)
UNABLE = [
    (q.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
    (q.bfloat16(), "interpreter multiplies the bits of bfloat16"),
    (torch.zeros(1, 1, 785, 2), "at most 784 tokens a window, got 785"),
    (torch.zeros(1, 1, 2, 129), "at most 128 channels a head, got 129"),
]


@pytest.mark.parametrize(("x", "message"), UNABLE, ids=[message[-20:] for _, message in UNABLE])
def test_says_what_the_kernels_cannot_do(x: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attend("triton", q=x, k=x, v=x)
    assert ops.dispatch.choose("window_attention_partitioned", x, x, x) == "torch"
