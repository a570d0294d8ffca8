"""The native kernels of window attention against the float64 definition, at every level that runs here: values,
gradients, and what must not depend on threads, strides or luck.

Letters: B batch · T frames · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native, ops
from tests.ops.rounding import assert_as_exact
from tests.ops.test_window_attention_long import FLOOR_OF_LOGIT_SCALE, Case, plain, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FLOOR = 1e-6
"""Relative errors below this are float32's rounding in whatever order, and are not compared."""

CASES = {
    "window-7-shifted": Case((14, 7), (7, 7), (3, 3), heads=2, head_dim=32, batch=2),
    "window-7-ragged-masked": Case((10, 9), (7, 7), (3, 2), heads=2, term="bias"),
    "window-7-ragged-filled": Case((15, 9), (7, 7), (3, 3), heads=2, head_dim=32, pad_mode="bias"),
    "pads-in-two-windows-of-an-axis": Case((8, 9), (7, 7), (5, 6), pad_mode="bias", term="none"),
    "window-12-shifted": Case((12, 15), (12, 12), (6, 6), head_dim=32),
    "video-shifted": Case((8, 7, 5), (4, 3, 4), (2, 1, 3), heads=2, batch=2),
    "video-8-7-7-cyclic": Case((9, 7, 8), (8, 7, 7), (2, 3, 3), cyclic=(True, False, False), head_dim=64),
    "video-ragged-filled": Case((3, 5, 7), (2, 3, 4), (1, 1, 2), heads=2, pad_mode="bias", cyclic=True),
    "map-shorter-head-dim-20": Case((5, 6), (7, 7), (3, 3), heads=2, head_dim=20),
    "map-shorter-whole-bias": Case((3, 9), (7, 5), (3, 3), heads=3, head_dim=4, term="bias"),
    "one-token": Case((1, 1), (7, 7), (3, 3), heads=2, head_dim=1),
    "cosine-head-dim-7": Case((13, 6), (5, 3), (2, 1), heads=3, head_dim=7, cosine=True),
    "cosine-ragged-filled": Case((9, 6), (5, 4), (2, 1), heads=2, pad_mode="bias", cosine=True),
    "cosine-15-13-head-dim-128": Case((15, 14), (15, 13), (2, 1), head_dim=128, term="bias", cosine=True),
    "own-scale-head-dim-128": Case((15, 13), (15, 13), head_dim=128, scale=0.03, term="bias"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FEW = ("window-7-ragged-filled", "cosine-head-dim-7", "video-8-7-7-cyclic")
few = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


def grad_for(tensors: dict[str, Tensor]) -> Tensor:
    qkv = tensors["qkv"]
    return torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3).to(qkv.dtype)


def exactly(tensors: dict[str, Tensor], values: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    return run(ops.window_attention_reference, wide, values, grad_out.double())


def check(case: Case, dtype: torch.dtype, what: object = None) -> None:
    """Hold our error against plain PyTorch's in the same dtype: twice as much in values, thrice in gradients."""
    tensors, values = case.make(dtype, "cpu")
    grad_out = grad_for(tensors)
    exact = exactly(tensors, values, grad_out)
    ours, usual = run(ops.window_attention, tensors, values, grad_out), run(plain, tensors, values, grad_out)
    for name, x in exact.items():
        assert ours[name].dtype == (dtype if name == "out" else tensors[name[1:]].dtype), name
        error, least = ((y[name].double() - x).norm().item() for y in (ours, usual))
        # A factor of up to 100 stands before a cosine and the roundings in it.
        floor = FLOOR_OF_LOGIT_SCALE if name == "dlogit_scale" else 5 * FLOOR if case.cosine else FLOOR
        # The gradient of scores is a difference: where it is zero, the rounding of its terms remains.
        scale = max(x.norm().item(), grad_out.norm().item() if name != "out" else 0)
        allowed = max((2 if name == "out" else 3) * least, floor * scale)
        worst = (ours[name].double() - x).abs().argmax().item()
        got, wanted = ours[name].flatten()[worst].item(), x.flatten()[worst].item()
        assert error <= allowed, (
            f"window_attention, {name}, {dtype}, {case}, {what}: {error:.2e}, allowed is {allowed:.2e}; "
            f"worst at {worst}: {got} instead of {wanted}"
        )


@DTYPES
@cases
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(case, dtype, level)


@given(axes=st.sampled_from([2, 3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_any_geometry(axes: int, dtype: torch.dtype, data: st.DataObject) -> None:
    def each(strategy: st.SearchStrategy) -> tuple:
        return data.draw(st.tuples(*[strategy] * axes))

    size, window, cyclic = each(st.integers(1, 9)), each(st.integers(1, 8 if axes == 2 else 5)), each(st.booleans())
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    heads, head_dim, batch = (data.draw(st.integers(1, most)) for most in (3, 40, 2))
    pad_mode, term = data.draw(st.sampled_from(["mask", "bias"])), data.draw(st.sampled_from(["table", "bias", "none"]))
    cosine = head_dim > 1 and data.draw(st.booleans())  # a single channel has a sign and no direction
    check(Case(size, window, shift, heads, head_dim, batch, pad_mode, cyclic, term, cosine), dtype)


@pytest.mark.parametrize("name", ["window-7-ragged-filled", "cosine-ragged-filled", "map-shorter-whole-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_gradients(name: str, dtype: torch.dtype) -> None:
    tensors, values = CASES[name].make(dtype, "cpu")
    grad_out = grad_for(tensors)
    everything = run(ops.window_attention, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = torch.autograd.grad(ops.window_attention(**some, **values), [some[n] for n in subset], grad_out)
            for n, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{n}"]), f"d{n} when only {subset} are asked for"


def test_inference_equals_training_and_nothing_is_kept(level: str) -> None:
    tensors, values = CASES["window-7-shifted"].make(torch.bfloat16, "cpu")
    trained = ops.window_attention(**tensors, **values)
    with torch.no_grad():
        assert torch.equal(ops.window_attention(**tensors, **values), trained)
    saved = [x for x in trained.grad_fn.saved_tensors if x is not None]
    assert not any(x.numel() for x in saved if all(x is not y for y in tensors.values()))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_of_another_dtype(weights: torch.dtype) -> None:
    """What is added to the scores may have another dtype than qkv, as autocast leaves it; float64 has no kernel."""
    tensors, values = CASES["cosine-ragged-filled"].make(torch.float32, "cpu")
    mixed = {n: x.detach().to(x.dtype if n == "qkv" else weights).requires_grad_() for n, x in tensors.items()}
    grad_out = grad_for(tensors)
    if weights == torch.float64:
        with pytest.raises(RuntimeError, match=r"tensors must be float32, bfloat16 or float16, got torch\.float64"):
            ops.window_attention(**mixed, **values)
        return
    got, exact = run(ops.window_attention, mixed, values, grad_out), exactly(mixed, values, grad_out)
    for name, x in exact.items():
        wide = name in ("out", "dqkv")
        assert got[name].dtype == (torch.float32 if wide else weights)
        assert (got[name].double() - x).norm() <= (3e-6 if wide else 4e-3) * x.norm(), name


def test_logit_scale_in_the_shape_of_checkpoints() -> None:
    tensors, values = CASES["cosine-head-dim-7"].make(torch.float32, "cpu")
    grad_out = grad_for(tensors)
    expected = run(ops.window_attention, tensors, values, grad_out)
    tensors["logit_scale"] = tensors["logit_scale"].detach().view(-1, 1, 1).requires_grad_()
    got = run(ops.window_attention, tensors, values, grad_out)
    assert got["dlogit_scale"].shape == (3, 1, 1) and got["dlogit_scale"][1] == 0, "beyond the clamp"
    assert all(torch.equal(x.flatten(), expected[name].flatten()) for name, x in got.items())


@DTYPES
@few
def test_bit_equal_for_any_number_of_threads(case: Case, dtype: torch.dtype, level: str) -> None:
    tensors, values = replace(case, batch=3).make(dtype, "cpu")
    grad_out, found = grad_for(tensors), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(ops.window_attention, tensors, values, grad_out))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


def test_more_windows_than_tasks(level: str) -> None:
    """Runs of windows are then longer than one, and their sums several windows'."""
    check(Case((12, 10), (2, 2), (1, 0), heads=2, head_dim=8, batch=5, pad_mode="bias"), torch.float32, level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@few
def test_any_strides_and_addresses(case: Case, dtype: torch.dtype, level: str) -> None:
    tensors, values = case.make(dtype, "cpu")
    grad_out = grad_for(tensors)
    expected = run(ops.window_attention, tensors, values, grad_out)
    turned = {n: x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for n, x in tensors.items()}
    shifted = {
        n: torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape) for n, x in tensors.items()
    }
    for others in (turned, shifted):
        others = {n: x.requires_grad_() for n, x in others.items()}
        got = run(ops.window_attention, others, values, grad_out.mT.contiguous().mT)
        assert all(torch.equal(x, expected[name]) for name, x in got.items())
    assert not turned["qkv"].is_contiguous() and shifted["qkv"].data_ptr() % 64


def test_an_expanded_gradient(level: str) -> None:
    tensors, values = CASES["window-7-shifted"].make(torch.float32, "cpu")
    (got,) = torch.autograd.grad(ops.window_attention(**tensors, **values).sum(), tensors["qkv"])
    wanted = exactly(tensors, values, torch.ones_like(grad_for(tensors)))["dqkv"]
    torch.testing.assert_close(got, wanted.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    tensors, values = replace(CASES["cosine-ragged-filled"], batch=0).make(dtype, "cpu")
    got = run(ops.window_attention, tensors, values, grad_for(tensors))
    assert got["out"].shape == grad_for(tensors).shape and got["dqkv"].shape == tensors["qkv"].shape
    assert not any(got[f"d{name}"].any() for name in ("rel_pos_bias_table", "qkv_bias", "logit_scale"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_stays_in_its_window_and_is_not_lost(part: int, dtype: torch.dtype, level: str) -> None:
    tensors, values = CASES["window-7-ragged-masked"].make(dtype, "cpu")
    with torch.no_grad():
        tensors["qkv"][0, 4, 5, part * 32] = math.nan
    grad_out = grad_for(tensors)
    ours, exact = run(ops.window_attention, tensors, values, grad_out), exactly(tensors, values, grad_out)
    assert ours["out"].isnan().any() and not ours["out"].isnan().all()
    for name, x in ours.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@DTYPES
@pytest.mark.parametrize("name", ["window-7-ragged-masked", "window-7-ragged-filled"])
def test_huge_scores(name: str, dtype: torch.dtype, level: str) -> None:
    """Scores of +-10,000 and more: probabilities are 0 and 1, and nothing is infinite."""
    tensors, values = CASES[name].make(dtype, "cpu")
    values["scale"] = 1e4
    grad_out = torch.full_like(grad_for(tensors), 1e-3)
    got, exact = run(ops.window_attention, tensors, values, grad_out), exactly(tensors, values, grad_out)
    assert all(x.isfinite().all() for x in got.values())
    tolerance = {torch.float32: 3e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}[dtype]
    assert (got["out"].double() - exact["out"]).norm() <= tolerance * exact["out"].norm()


def test_a_bias_that_blocks_and_one_that_dwarfs(level: str) -> None:
    """Keys that a bias of -inf forbids count as nothing; the largest bias of a row takes everything."""
    tensors, values = CASES["window-7-ragged-masked"].make(torch.float32, "cpu")
    with torch.no_grad():
        tensors["bias"].masked_fill_(torch.rand_like(tensors["bias"]) < 0.5, -math.inf)
        tensors["bias"].diagonal(dim1=1, dim2=2).fill_(0)
        tensors["bias"][:, :, 3] += 1e4
    grad_out = grad_for(tensors)
    got, exact = run(ops.window_attention, tensors, values, grad_out), exactly(tensors, values, grad_out)
    usual = run(ops.window_attention_reference, tensors, values, grad_out)
    for name, x in exact.items():
        assert_as_exact(got[name], usual[name], x, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_without_a_direction(dtype: torch.dtype, level: str) -> None:
    """The cosine of a zero vector is 0, and its gradient that of the definition."""
    tensors, values = CASES["cosine-head-dim-7"].make(dtype, "cpu")
    with torch.no_grad():
        tensors["qkv"][0, 2, 3, :42] = 0
    got = run(ops.window_attention, tensors, values, grad_for(tensors))
    assert got["out"].isfinite().all() and not any(x.isnan().any() for x in got.values())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, train: bool) -> None:
    case = CASES["cosine-ragged-filled"]
    tensors, _ = case.make(dtype, "cpu")
    tensors = {name: x.requires_grad_(train) for name, x in tensors.items()}
    values = (list(case.window), case.heads, list(case.shift), 1.0, "bias", [False, False], train, "cpp")
    given_ = [tensors.get(n) for n in ("qkv", "rel_pos_bias_table", "bias", "logit_scale", "qkv_bias")]
    torch.library.opcheck(torch.ops.florence_fast.window_attention.default, (*given_, *values))


@pytest.mark.parametrize(
    "needs", [(True,) * 5, (False, True, False, False, False), (True, False, False, False, True)], ids=str
)
def test_opcheck_backward(needs: tuple[bool, ...]) -> None:
    case = CASES["cosine-ragged-filled"]
    tensors = {name: x.detach() for name, x in case.make(torch.float32, "cpu")[0].items()}
    given_ = [tensors.get(n) for n in ("qkv", "rel_pos_bias_table", "bias", "logit_scale", "qkv_bias")]
    needs = [need and x is not None for need, x in zip(needs, given_, strict=True)]
    values = (list(case.window), case.heads, list(case.shift), 1.0, "bias", [False, False], True, "cpp")
    arguments = (grad_for(tensors), *given_, torch.empty(0), needs, *values)
    torch.library.opcheck(
        torch.ops.florence_fast.window_attention_backward.default,
        arguments,
        test_utils=["test_schema", "test_faketensor"],
    )


def test_compiles_in_full() -> None:
    tensors, values = CASES["window-7-ragged-filled"].make(torch.float32, "cpu")
    grad_out = grad_for(tensors)
    compiled = torch.compile(lambda **x: ops.window_attention(**x, **values), fullgraph=True, backend="aot_eager")
    got, expected = run(compiled, tensors, {}, grad_out), run(ops.window_attention, tensors, values, grad_out)
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


def test_autocast() -> None:
    tensors, values = CASES["window-7-ragged-filled"].make(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.window_attention(**tensors, **values)
    low = ops.window_attention(**{**tensors, "qkv": tensors["qkv"].bfloat16()}, **values)
    assert out.dtype == torch.bfloat16 and torch.equal(out, low)


def test_what_it_cannot_take() -> None:
    def reasons(qkv: Tensor, table: Tensor | None = None, **others: Tensor) -> list[str]:
        options = {"window_size": 2, "num_heads": 1, **others}
        return ops.OPS["window_attention"].unsupported_reasons("cpp", qkv, table, **options)

    qkv, wrong = torch.ones(1, 2, 2, 6), "tensors must be float32, bfloat16 or float16, got torch.float64"
    assert not reasons(qkv.bfloat16(), torch.ones(9, 1), logit_scale=torch.ones(1).half())
    assert reasons(qkv.double()) == reasons(qkv, torch.ones(9, 1).double()) == [wrong]
    assert reasons(qkv, qkv_bias=torch.ones(6).double()) == [wrong]
    assert reasons(torch.ones(1, 2, 2, 6, device="meta")) == ["native kernels run on the CPU, not on meta"]
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run window_attention: tensors must be float32"):
        ops.window_attention(qkv.double(), window_size=2, num_heads=1)
