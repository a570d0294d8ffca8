"""``ops.contrastive_loss`` against its definition, the paper's sums written out, and PyTorch's cross-entropy.

Letters: B pairs · R rows · N columns · D embedding dim
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops import dispatch
from florence_fast.ops.contrastive_loss import (
    contrastive_loss,
    contrastive_loss_reference,
    contrastive_statistics,
    contrastive_statistics_reference,
    positive_weight,
)
from tests.ops.rounding import assert_as_exact

F64 = torch.float64
NAMES = ("loss", "du", "dv", "dscale")

# id: (B, D, distinct labels or None for CLIP, chunk_size)
SHAPES = {
    "clip": (12, 5, None, None),
    "clip-ragged-chunks": (13, 5, None, 4),
    "unicl": (12, 5, 4, None),
    "unicl-ragged-chunks": (13, 5, 4, 5),
    "chunk-of-one": (5, 3, 2, 1),
    "all-one-label": (6, 4, 1, 4),
    "one-pair": (1, 4, None, None),
    "chunk-longer-than-batch": (7, 8, 3, 100),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(shape: tuple, dtype: torch.dtype = F64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return features, scale and labels; hashes are as far apart as int64 allows."""
    batch, dim, distinct, _ = shape
    u, v = F.normalize(torch.randn(2, batch, dim, dtype=F64), dim=-1).to(device, dtype)
    labels = None if distinct is None else (torch.randint(distinct, (batch,)) * 2**62 - 2**62).to(device)
    return u, v, torch.tensor(9.0, dtype=torch.promote_types(dtype, torch.float32), device=device), labels


def with_gradients(function, u: Tensor, v: Tensor, scale: Tensor, labels: Tensor | None, **options) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (u, v, scale)]
    loss = function(*leaves, labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@shapes
@pytest.mark.parametrize("reduction", ["mean_directions", "sum_directions"])
def test_value_and_gradients_are_those_of_the_definition(shape, reduction, device):
    arguments = inputs(shape, device=device)
    got = with_gradients(contrastive_loss, *arguments, chunk_size=shape[-1], reduction=reduction)
    wanted = with_gradients(contrastive_loss_reference, *arguments, reduction=reduction)
    for name, x, y in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_as_the_eager_definition(dtype, device):
    u, v, scale, labels = inputs((64, 16, 20, 24), dtype, device)
    exact = with_gradients(contrastive_loss_reference, u.double(), v.double(), scale.double(), labels)
    eager = with_gradients(contrastive_loss_reference, u, v, scale, labels)
    got = with_gradients(contrastive_loss, u, v, scale, labels, chunk_size=24)
    assert got[0].dtype == got[3].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for name, x, y, z in zip(NAMES, got, eager, exact, strict=True):
        error, allowed = ((t.double() - z).norm() / z.norm() for t in (x, y))
        assert error <= 2 * allowed + 1e-6, f"{name} in {dtype}: error {error:.2e}, eager's {allowed:.2e}"


def test_definition_is_the_papers_sum_over_positives():
    u, v, scale, labels = inputs((9, 4, 3, None))
    logits = [[float(scale * (a @ b)) for b in v] for a in u]
    transposed = list(zip(*logits, strict=True))
    labels = labels.tolist()

    def direction(rows) -> float:
        total = 0.0
        for i, row in enumerate(rows):
            positives = [k for k, label in enumerate(labels) if label == labels[i]]
            below = math.log(sum(math.exp(x) for x in row))
            total -= sum(row[k] - below for k in positives) / len(positives)
        return total / len(rows)

    wanted = direction(logits) + direction(transposed)
    got = contrastive_loss_reference(u, v, scale, torch.tensor(labels), reduction="sum_directions")
    assert float(got) == pytest.approx(wanted, rel=1e-13)


def test_without_labels_it_is_the_cross_entropy_of_open_clip():
    u, v, scale, _ = inputs((11, 6, None, None))
    logits, own = scale * u @ v.T, torch.arange(11)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(u, v, scale, chunk_size=4), wanted, rtol=1e-13, atol=0)


def test_a_loss_near_zero_keeps_its_digits(device):
    images = torch.randn(64, 32, device=device)
    texts = F.normalize(images + 0.5 * torch.randn(64, 32, device=device), dim=-1)
    images = F.normalize(images, dim=-1)
    scale = torch.tensor(30.0, device=device)
    exact = contrastive_loss_reference(images.double(), texts.double(), scale.double())
    plain = contrastive_loss_reference(images, texts, scale)
    error, allowed = (abs(x - exact) / exact for x in (contrastive_loss(images, texts, scale, chunk_size=24), plain))
    assert 1e-6 < exact < 1e-3, f"the pairs are too hard or too easy: {exact:.1e}"
    assert error * exact <= 2 * allowed * exact + 2e-8, f"error {error:.1e}, eager's {allowed:.1e} of {exact:.1e}"


# id: (images, texts, labels of images, labels of texts); None is CLIP, texts beyond the images being wrong for all
ONE_WAY = {
    "more-texts": (4, 9, None, None),
    "one-label-for-both": (6, 6, 3, None),
    "own-labels": (7, 5, 3, 3),
}


@pytest.mark.parametrize("case", ONE_WAY.values(), ids=ONE_WAY)
def test_one_direction_takes_unequal_numbers(case, device):
    num_images, num_texts, of_images, of_texts = case
    u, _, scale, _ = inputs((num_images, 5, None, None), device=device)
    _, v, _, _ = inputs((num_texts, 5, None, None), device=device)
    labels = None if of_images is None else torch.arange(num_images, device=device) % of_images
    text_labels = None if of_texts is None else torch.arange(num_texts, device=device) % of_texts
    options = {"reduction": "image_to_text", "text_labels": text_labels}
    got = with_gradients(contrastive_loss, u, v, scale, labels, chunk_size=3, **options)
    wanted = with_gradients(contrastive_loss_reference, u, v, scale, labels, **options)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    if labels is None:
        own = torch.arange(num_images, device=device)
        torch.testing.assert_close(got[0], F.cross_entropy(scale * u @ v.T, own), rtol=1e-13, atol=0)


def test_both_directions_are_the_mean_of_one_and_of_the_other():
    u, v, scale, labels = inputs((8, 5, 3, None))
    one, other = (contrastive_loss(*x, scale, labels, reduction="image_to_text") for x in ((u, v), (v, u)))
    torch.testing.assert_close(contrastive_loss(u, v, scale, labels), (one + other) / 2, rtol=1e-13, atol=0)


def test_an_image_without_a_positive_makes_the_loss_nan():
    u, v, scale, labels = inputs((4, 5, 2, None))
    for function in (contrastive_loss, contrastive_loss_reference):
        loss = function(u, v, scale, labels, text_labels=labels + 1, reduction="image_to_text")
        assert loss.isnan(), function.__name__


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_each_subset_of_gradients_is_that_of_all(needs):
    u, v, scale, labels = inputs((7, 4, 3, 3))
    everything = with_gradients(contrastive_loss, u, v, scale, labels, chunk_size=3)[1:]
    leaves = [x.clone().requires_grad_(bool(need)) for x, need in zip((u, v, scale), needs, strict=True)]
    contrastive_loss(*leaves, labels, chunk_size=3).backward()
    for leaf, need, wanted in zip(leaves, needs, everything, strict=True):
        assert leaf.grad is None if not need else torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("function", [contrastive_loss, contrastive_loss_reference], ids=lambda f: f.__name__)
def test_gradcheck(function):
    u, v, scale, labels = inputs((5, 3, 2, 2))
    leaves = [x.requires_grad_() for x in (u, v, scale)]
    loss = functools.partial(function, labels=labels, chunk_size=2)
    # An undefined gradient cannot reach the op: all of its output enters the loss.
    assert torch.autograd.gradcheck(loss, leaves)


def test_statistics_of_some_rows_against_all_columns():
    u, v, scale, labels = inputs((9, 4, 3, None))
    results = []
    for function, options in ((contrastive_statistics, {"chunk_size": 2}), (contrastive_statistics_reference, {})):
        leaves = [x.detach().clone().requires_grad_() for x in (u[:4], v, scale)]
        statistics = function(*leaves, labels[:4], labels, positive_weight(labels[:4], labels, F64), **options)
        weights = [torch.linspace(-1, 2, len(x), dtype=F64) for x in statistics]
        total = sum((w * x).sum() for w, x in zip(weights, statistics, strict=True))
        results.append([*statistics, *torch.autograd.grad(total, leaves)])
        assert not statistics.row_top.requires_grad and not statistics.col_top.requires_grad
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_no_rows_add_nothing_to_the_columns():
    u, v, scale, labels = inputs((6, 4, 3, None))
    u, v = u[:0].requires_grad_(), v.requires_grad_()
    none = labels[:0]
    got = contrastive_statistics(u, v, scale, none, labels, positive_weight(none, labels, F64))
    assert len(got.row_top) == len(got.row_rest) == len(got.positive) == 0
    assert (got.col_top == -torch.inf).all() and (got.col_rest == -torch.inf).all()
    du, dv = torch.autograd.grad(got.col_rest.exp().sum(), (u, v))
    assert du.shape == (0, 4) and torch.equal(dv, torch.zeros(6, 4, dtype=F64))


def test_large_scales_neither_overflow_nor_lose_the_far_rows():
    u, v, _, _ = inputs((8, 4, None, None), torch.float32)
    u[0], v[0] = torch.eye(4)[0], -torch.eye(4)[0]
    scale = torch.tensor(2000.0)
    exact = with_gradients(contrastive_loss_reference, u.double(), v.double(), scale.double(), None)
    usual = with_gradients(contrastive_loss_reference, u, v, scale, None)
    got = with_gradients(contrastive_loss, u, v, scale, None, chunk_size=3)
    for name, *found in zip(NAMES, got, usual, exact, strict=True):
        assert_as_exact(*found, name)


@pytest.mark.parametrize("gap", [20, 50, 59, 70, 110])
def test_log_sum_exps_far_apart_have_right_gradients(gap):
    u = torch.zeros(6, 8)
    u[:, 0] = 1
    v = F.normalize(torch.randn(6, 8), dim=-1) * 0.1
    v[2, 0], u[3, 0] = -1.0, -1.0
    scale = torch.tensor(float(gap))
    exact = with_gradients(contrastive_loss_reference, u.double(), v.double(), scale.double(), None)
    usual = with_gradients(contrastive_loss_reference, u, v, scale, None)
    got = with_gradients(contrastive_loss, u, v, scale, None, chunk_size=4)
    for name, *found in zip(NAMES, got, usual, exact, strict=True):
        assert_as_exact(*found, name)


def test_a_scale_that_is_a_number_is_not_rounded_to_the_features():
    u, v, _, _ = inputs((8, 16, None, None), torch.bfloat16)
    wanted = contrastive_loss(u, v, torch.tensor(100.3))
    assert contrastive_loss(u, v, 100.3) == wanted


def test_no_tensor_is_larger_than_the_features_or_a_tile():
    batch, dim, chunk = 128, 2, 16
    u, v, scale, labels = inputs((batch, dim, 40, None), torch.float32)
    leaves = [x.requires_grad_() for x in (u, v, scale)]

    def largest_allocation(chunk_size: int) -> int:
        # The scratch memory of oneDNN's products in "cpp" is larger than everything here, but not at real sizes.
        with torch.profiler.profile(profile_memory=True) as profile, dispatch.backend("torch"):
            contrastive_loss(*leaves, labels, chunk_size=chunk_size).backward()
        events = profile.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    assert largest_allocation(batch) >= 4 * batch * batch, "the profiler no longer sees what the op allocates"
    # Sorting the labels holds a few rows of B int64; a tile of float32 is 1 KiB here and the full matrix 64 KiB.
    assert largest_allocation(chunk) <= max(4 * chunk * chunk, 4 * batch * dim, 4 * 3 * batch, 2 * 8 * batch)


def test_scale_may_be_a_number_or_hold_one_value():
    u, v, scale, labels = inputs((6, 4, 3, None))
    wanted = contrastive_loss(u, v, scale, labels)
    one_value = scale.reshape(1).requires_grad_()
    loss = contrastive_loss(u, v, one_value, labels)
    loss.backward()
    assert contrastive_loss(u, v, 9.0, labels) == loss == wanted
    assert loss.shape == () and one_value.grad == with_gradients(contrastive_loss, u, v, scale, labels)[3]


def test_features_need_not_be_contiguous():
    u, v, scale, labels = inputs((6, 4, 3, None))
    strided = with_gradients(contrastive_loss, u.T.contiguous().T, torch.stack([v, v], 1)[:, 0], scale, labels)
    for x, y in zip(strided, with_gradients(contrastive_loss, u, v, scale, labels), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)


def test_autocast_changes_nothing():
    arguments = inputs((16, 8, 5, 6), torch.float32)
    wanted = with_gradients(contrastive_loss, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(contrastive_loss, *arguments)
        defined = contrastive_loss_reference(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    torch.testing.assert_close(defined, wanted[0], rtol=1e-6, atol=0)


def test_two_runs_are_equal_to_the_bit(device):
    arguments = inputs((40, 8, 11, 16), torch.float32, device)
    first, second = (with_gradients(contrastive_loss, *arguments, chunk_size=16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_opcheck(device):
    u, v, scale, labels = inputs((6, 4, 3, None), torch.float32, device)
    tensors = [x.requires_grad_() for x in (u, v, scale)]
    weight = positive_weight(labels, labels, torch.float32)
    torch.library.opcheck(
        torch.ops.florence_fast.contrastive_loss.default, (*tensors, labels, labels, weight, 4, "torch")
    )


@pytest.mark.parametrize("needs", [[True] * 3, [False, True, False]], ids=["all", "texts-alone"])
def test_opcheck_of_the_backward_with_strided_features(needs):
    u, v, scale, labels = inputs((6, 4, 3, None), torch.float32)
    u, v = (x.T.contiguous().T for x in (u, v))
    none = [False] * 3
    tensors = (u, v, scale, labels, labels, torch.rand(6), torch.randn(12), torch.randn(12))
    arguments = (torch.randn(18), *tensors, [*needs, *none], 4, "torch")
    torch.library.opcheck(torch.ops.florence_fast.contrastive_loss_backward.default, arguments)


@pytest.mark.parametrize("distinct", [None, 3], ids=["clip", "unicl"])
def test_compiles_into_one_graph(distinct):
    arguments = inputs((6, 4, distinct, None))
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    wanted = with_gradients(contrastive_loss, *arguments, chunk_size=4)
    for x, y in zip(with_gradients(compiled, *arguments, chunk_size=4), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)


def test_reference_backend_is_the_definition_and_can_be_differentiated_twice():
    arguments = inputs((40, 8, 11, None), torch.float32)
    wanted = with_gradients(contrastive_loss_reference, *arguments)
    with dispatch.backend("reference"):
        got = with_gradients(contrastive_loss, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    u, v, scale, labels = inputs((5, 3, 2, None))
    leaves = [x.requires_grad_() for x in (u, v, scale)]
    with dispatch.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *x: contrastive_loss(*x, labels), leaves)


def test_a_backend_without_a_kernel_is_refused():
    with (
        dispatch.backend("cpp"),
        pytest.raises(RuntimeError, match="cannot run contrastive_loss"),
    ):
        contrastive_loss(*inputs((4, 3, None, None)))


def test_the_table_of_ops_can_call_it(device):
    args, kwargs = dispatch.OPS["contrastive_loss"].example(device)
    entry = dispatch.OPS["contrastive_loss"]
    torch.testing.assert_close(entry.function(*args, **kwargs), entry.reference(*args, **kwargs))


U = torch.eye(4)
Y = torch.arange(4)
ONE = {"reduction": "image_to_text"}
BAD = {
    "no-tensor": ((None, U, 1.0), {}, TypeError, "image_features must be a floating-point tensor, got NoneType"),
    "integers": ((U, U.long(), 1.0), {}, TypeError, "text_features must be a floating-point tensor, got torch.int64"),
    "three-axes": (
        (U[None], U[None], 1.0),
        {},
        ValueError,
        r"image_features must have shape \(B, D\), got \(1, 4, 4\)",
    ),
    "empty": ((U[:0], U[:0], 1.0), {}, ValueError, "image_features must hold at least one pair, got an empty batch"),
    "unequal": ((U, U[:3], 1.0), {}, ValueError, "text_features must have the shape of image_features"),
    "dtypes": ((U, U.double(), 1.0), {}, ValueError, "text_features must have the dtype of image_features"),
    "two-scales": ((U, U, torch.ones(2)), {}, ValueError, r"logit_scale must be one .* value on cpu, got shape \(2,\)"),
    "integer-scale": ((U, U, torch.tensor(1)), {}, ValueError, "logit_scale must be one floating-point value"),
    "labels-dtype": ((U, U, 1.0, Y.int()), {}, TypeError, "labels must be an int64 tensor, got torch.int32"),
    "labels-list": ((U, U, 1.0, [1, 2, 3, 4]), {}, TypeError, "labels must be an int64 tensor, got list"),
    "labels-shape": ((U, U, 1.0, Y[:3]), {}, ValueError, r"labels must have shape \(4,\) on cpu, got \(3,\)"),
    "reduction": ((U, U, 1.0), {"reduction": "mean_direction"}, ValueError, "did you mean 'mean_directions'"),
    "two-ways-two-labels": (
        (U, U, 1.0, Y),
        {"text_labels": Y},
        ValueError,
        "text_labels must be None for a loss of both",
    ),
    "text-labels-alone": ((U, U, 1.0), {"text_labels": Y, **ONE}, ValueError, "labels must be given when text_labels"),
    "text-labels-shape": (
        (U, U[:3], 1.0, Y),
        {"text_labels": Y, **ONE},
        ValueError,
        r"text_labels must have shape \(3,\) on cpu, got \(4,\)",
    ),
    "no-text-labels": ((U, U[:3], 1.0, Y), ONE, ValueError, "text_labels must be given, one for each of the 3 texts"),
    "too-few-texts": ((U, U[:3], 1.0), ONE, ValueError, "text_features must hold at least the 4 texts"),
    "one-way-width": ((U, U[:, :3], 1.0), ONE, ValueError, r"text_features must have shape \(N, 4\), got \(4, 3\)"),
    "chunk": ((U, U, 1.0), {"chunk_size": 0}, ValueError, "chunk_size must be a positive int, got 0"),
}


@pytest.mark.parametrize("args, kwargs, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        contrastive_loss(*args, **kwargs)
