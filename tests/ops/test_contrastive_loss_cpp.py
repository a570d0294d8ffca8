"""The native passes of the contrastive loss against the float64 definition, at every level that runs here.

Letters: B pairs · R rows · N columns · D embedding dim
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native
from florence_fast.ops.contrastive_loss import (
    contrastive_loss,
    contrastive_loss_reference,
    contrastive_statistics,
    contrastive_statistics_reference,
    positive_weight,
)
from tests.ops.rounding import assert_as_exact
from tests.ops.test_contrastive_loss import NAMES, inputs, with_gradients

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# id: (B, D, distinct labels or None for CLIP, chunk_size)
SHAPES = {
    "clip-ragged": (101, 40, None, None),
    "clip-whole-vectors": (256, 32, None, 128),
    "unicl-many-bands": (389, 24, 60, None),
    "unicl-ragged-chunks": (200, 48, 30, 70),
    "one-label": (70, 16, 1, 33),
    "one-pair": (1, 5, None, None),
    "chunk-of-one": (5, 3, 2, 1),
}


def check(shape: tuple, dtype: torch.dtype) -> None:
    u, v, scale, labels = inputs(shape, dtype)
    exact = with_gradients(contrastive_loss_reference, u.double(), v.double(), scale.double(), labels)
    usual = with_gradients(contrastive_loss_reference, u, v, scale, labels)
    ours = with_gradients(contrastive_loss, u, v, scale, labels, chunk_size=shape[-1])
    for name, x, plain, wanted in zip(NAMES, ours, usual, exact, strict=True):
        error, allowed = ((y.double() - wanted).norm() for y in (x, plain))
        # Where a sum is 0 or nearly so, as for a single pair, what is left is the rounding of its terms of size 1.
        floor = 1e-6 * max(wanted.norm().item(), 1.0 if shape[0] < 8 or name == "dscale" else 0.0)
        factor = 2 if name == "loss" else 3
        assert error <= max(factor * allowed, floor), f"{name}, {dtype}, {shape}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_exact_as_the_definition(shape: tuple, dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(shape, dtype)


@given(
    batch=st.integers(1, 300),
    dim=st.integers(1, 40),
    labels=st.none() | st.integers(1, 60),
    chunk_size=st.none() | st.integers(7, 200),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(batch: int, dim: int, labels: int | None, chunk_size: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(batch)
    check((batch, dim, labels, chunk_size), dtype)


def test_a_loss_near_zero_keeps_its_digits(level: str) -> None:
    images = torch.randn(90, 32)
    texts = torch.nn.functional.normalize(images + 0.5 * torch.randn(90, 32), dim=-1)
    images, scale = torch.nn.functional.normalize(images, dim=-1), torch.tensor(30.0)
    exact = contrastive_loss_reference(images.double(), texts.double(), scale.double())
    plain = contrastive_loss_reference(images, texts, scale)
    error, allowed = (abs(x - exact) for x in (contrastive_loss(images, texts, scale), plain))
    assert 1e-6 < exact < 1e-3, f"the pairs are too hard or too easy: {exact:.1e}"
    assert error <= 2 * allowed + 2e-8, f"error {error:.1e}, eager's {allowed:.1e} of {exact:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -7.0, 300.0])
def test_scales_of_any_sign_and_log_sum_exps_far_apart(scale: float, dtype: torch.dtype, level: str) -> None:
    u, v, _, labels = inputs((80, 24, 20, None), dtype)
    u[::3] *= 0.05
    scale = torch.tensor(scale)
    exact = with_gradients(contrastive_loss_reference, u.double(), v.double(), scale.double(), labels)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for name, x, y in zip(NAMES, with_gradients(contrastive_loss, u, v, scale, labels), exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item(), msg=name)


@pytest.mark.parametrize(("num_rows", "num_cols"), [(70, 150), (150, 90), (0, 40)], ids=str)
def test_statistics_of_some_rows_against_all_columns(num_rows: int, num_cols: int, level: str) -> None:
    rows, cols, scale = torch.randn(num_rows, 24), torch.randn(num_cols, 24), torch.tensor(2.0)
    col_labels = torch.randint(10, (num_cols,))
    row_labels = col_labels[torch.randint(num_cols, (num_rows,))]
    results = []
    for function, dtype in (
        (contrastive_statistics, torch.float32),
        (contrastive_statistics_reference, torch.float32),
        (contrastive_statistics_reference, torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (rows, cols, scale)]
        weight = positive_weight(row_labels, col_labels, dtype)
        statistics = function(*leaves, row_labels, col_labels, weight)
        total = sum((x.clamp(min=-1e4) * torch.linspace(-1, 2, len(x), dtype=dtype)).sum() for x in statistics)
        results.append([*statistics, *torch.autograd.grad(total, leaves)])
    for found in zip(*results, strict=True):
        assert_as_exact(*found)


def test_nan_is_not_lost(level: str) -> None:
    u, v, scale, labels = inputs((101, 16, None, None), torch.float32)
    v[3, 2] = torch.nan
    assert all(x.isnan().all() for x in with_gradients(contrastive_loss, u, v, scale, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_subset_of_gradients_is_that_of_all(dtype: torch.dtype) -> None:
    u, v, scale, labels = inputs((90, 24, 20, 40), dtype)
    everything = with_gradients(contrastive_loss, u, v, scale, labels, chunk_size=40)[1:]
    for needs in itertools.product((False, True), repeat=3):
        if not any(needs):
            continue
        leaves = [x.clone().requires_grad_(need) for x, need in zip((u, v, scale), needs, strict=True)]
        contrastive_loss(*leaves, labels, chunk_size=40).backward()
        for leaf, need, wanted in zip(leaves, needs, everything, strict=True):
            assert leaf.grad is None if not need else torch.equal(leaf.grad, wanted), needs


def passes(num_threads: int, logits: Tensor) -> list[Tensor]:
    """Run both kernels on a tile, all of whose columns from 3 to 9 are positives."""
    torch.set_num_threads(num_threads)
    rows, cols = logits.shape
    runs = torch.full((rows,), 3), torch.full((rows,), 9)
    top, total, positive = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)
    col_top, col_total = torch.full((cols,), -torch.inf), torch.zeros(cols)
    native.call("contrastive_loss_fwd", rows, cols, 0, logits, *runs, top, total, col_top, col_total, positive)
    grad, by_logit = torch.empty_like(logits), torch.zeros(rows)
    lse, col_lse = top + total.log(), col_top + col_total.log()
    ends = (lse, total, col_lse, col_total, positive)
    native.call("contrastive_loss_bwd", torch.float32, rows, cols, 0, logits, *runs, *ends, grad, by_logit)
    return [top, total, col_top, col_total, positive, grad, by_logit]


def test_bit_equal_for_any_number_of_threads(level: str) -> None:
    logits = torch.randn(401, 333)
    one, two = passes(1, logits), passes(2, logits)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_bit_equal_for_any_strides() -> None:
    u, v, scale, labels = inputs((67, 24, 9, None), torch.float32)
    expected = with_gradients(contrastive_loss, u, v, scale, labels)
    moved = torch.cat([torch.zeros(1), u.flatten()])[1:].view_as(u)
    for x, y in ((u.T.contiguous().T, torch.stack([v, v], 1)[:, 0]), (moved, v)):
        got = with_gradients(contrastive_loss, x, y, scale, labels)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool) -> None:
    u, v, scale, labels = inputs((40, 16, 9, None), torch.float32)
    leaves = [x.requires_grad_(train) for x in (u, v, scale)]
    arguments = (*leaves, labels, labels, positive_weight(labels, labels, torch.float32), 20, "cpp")
    torch.library.opcheck(torch.ops.florence_fast.contrastive_loss.default, arguments)


def test_compiles_in_full() -> None:
    u, v, scale, labels = inputs((40, 16, 9, None), torch.bfloat16)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    found, expected = (with_gradients(f, u, v, scale, labels) for f in (compiled, contrastive_loss))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_float64_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        contrastive_loss(*inputs((4, 3, None, None)))
