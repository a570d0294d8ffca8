"""The native passes of the sigmoid loss against the float64 definition, at every level that runs here.

Letters: B pairs · R rows · N columns · D embedding dim
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import native
from florence_fast.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference
from tests.ops.test_sigmoid_loss import NAMES, inputs, with_gradients

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# id: (B, N, D, distinct labels or None, chunk_size)
SHAPES = {
    "siglip-ragged": (101, 101, 40, None, None),
    "whole-vectors": (128, 128, 32, None, 64),
    "labels-in-ragged-chunks": (200, 150, 48, 30, 70),
    "one-label": (70, 40, 16, 1, 33),
    "more-texts-than-images": (9, 200, 5, None, None),
    "one-pair": (1, 1, 3, None, None),
}


def check(shape: tuple, dtype: torch.dtype) -> None:
    tensors, options = inputs(shape, dtype)
    exact = with_gradients(sigmoid_loss_reference, [x.double() for x in tensors], options)
    usual = with_gradients(sigmoid_loss_reference, tensors, options)
    ours = with_gradients(sigmoid_loss, tensors, options, chunk_size=shape[-1])
    for name, x, plain, wanted in zip(NAMES, ours, usual, exact, strict=True):
        error, allowed = ((y.double() - wanted).norm() for y in (x, plain))
        factor = 2 if name == "loss" else 3
        assert error <= max(factor * allowed, 2e-6 * wanted.norm()), f"{name}, {dtype}, {shape}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_exact_as_the_definition(shape: tuple, dtype: torch.dtype, level: str, poisoned_memory: None) -> None:
    check(shape, dtype)


@given(
    images=st.integers(1, 150),
    texts=st.integers(1, 150),
    dim=st.integers(1, 40),
    labels=st.integers(1, 60),
    chunk_size=st.none() | st.integers(7, 200),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(images: int, texts: int, dim: int, labels: int, chunk_size: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(images)
    check((images, texts, dim, labels, chunk_size), dtype)


@pytest.mark.parametrize("bias", [-60.0, 60.0, -200.0])
def test_far_logits_keep_their_digits(bias: float, level: str) -> None:
    """Of right answers the loss is as small as e^-|logit|; of wrong ones as large as the logit, however large."""
    u, v = torch.eye(19), torch.eye(19)
    exact = sigmoid_loss_reference(u.double(), v.double(), 2.0, bias)
    torch.testing.assert_close(sigmoid_loss(u, v, 2.0, bias).double(), exact, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -7.0])
def test_scales_of_any_sign(scale: float, dtype: torch.dtype, level: str) -> None:
    (u, v, _, bias), options = inputs((60, 70, 24, 20, None), dtype)
    tensors = [u, v, torch.tensor(scale), bias]
    exact = with_gradients(sigmoid_loss_reference, [x.double() for x in tensors], options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, x, y in zip(NAMES, with_gradients(sigmoid_loss, tensors, options), exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item(), msg=name)


def test_nan_is_not_lost(level: str) -> None:
    tensors, options = inputs((50, 60, 16, None, None), torch.float32)
    tensors[1][3, 2] = torch.nan
    loss, du, dv, dscale, dbias = with_gradients(sigmoid_loss, tensors, options)
    assert loss.isnan() and du.isnan().all() and dscale.isnan() and dbias.isnan() and dv[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_subset_of_gradients_is_that_of_all(dtype: torch.dtype) -> None:
    tensors, options = inputs((60, 70, 24, 20, None), dtype)
    everything = with_gradients(sigmoid_loss, tensors, options, chunk_size=40)[1:]
    for needs in itertools.product((False, True), repeat=4):
        if not any(needs):
            continue
        leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        sigmoid_loss(*leaves, **options, chunk_size=40).backward()
        for leaf, need, wanted in zip(leaves, needs, everything, strict=True):
            assert leaf.grad is None if not need else torch.equal(leaf.grad, wanted), needs


def passes(num_threads: int, logits: Tensor) -> list[Tensor]:
    """Run both kernels on a tile, all of whose columns from 3 to 9 are positives."""
    torch.set_num_threads(num_threads)
    rows, cols = logits.shape
    tile, runs = (rows, cols, 0, -1.5), (torch.full((rows,), 3), torch.full((rows,), 9))
    loss, total, by_logit = torch.zeros(3, rows)
    grad = torch.empty_like(logits)
    native.call("sigmoid_loss_fwd", *tile, logits, *runs, loss)
    native.call("sigmoid_loss_bwd", torch.float32, *tile, logits, *runs, loss, grad, total, by_logit)
    return [loss, grad, total, by_logit]


def test_bit_equal_for_any_number_of_threads(level: str) -> None:
    logits = torch.randn(401, 333)
    assert all(torch.equal(x, y) for x, y in zip(passes(1, logits), passes(2, logits), strict=True))


def test_bit_equal_for_any_strides() -> None:
    (u, v, *scalars), options = inputs((67, 67, 24, 9, None), torch.float32)
    expected = with_gradients(sigmoid_loss, [u, v, *scalars], options)
    moved = torch.cat([torch.zeros(1), u.flatten()])[1:].view_as(u)
    for x, y in ((u.T.contiguous().T, torch.stack([v, v], 1)[:, 0]), (moved, v)):
        got = with_gradients(sigmoid_loss, [x, y, *scalars], options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool) -> None:
    tensors, options = inputs((30, 40, 16, 9, None), torch.float32)
    arguments = (*(x.requires_grad_(train) for x in tensors), *options.values(), 20, "cpp")
    torch.library.opcheck(torch.ops.florence_fast.sigmoid_loss.default, arguments)


def test_compiles_in_full() -> None:
    tensors, options = inputs((30, 40, 16, 9, None), torch.bfloat16)
    compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")
    found, expected = (with_gradients(f, tensors, options) for f in (compiled, sigmoid_loss))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_float64_is_refused_with_the_reason() -> None:
    tensors, options = inputs((4, 4, 3, None, None))
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        sigmoid_loss(*tensors, **options)
