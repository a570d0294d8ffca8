"""``ops.sigmoid_loss`` against its definition, SigLIP's sum written out, and its contract as an op.

Letters: B images · N texts · D embedding dim
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast import ops
from florence_fast.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference

F64 = torch.float64
NAMES = ("loss", "du", "dv", "dscale", "dbias")

# id: (B, N, D, distinct labels or None, chunk_size)
SHAPES = {
    "siglip": (12, 12, 5, None, None),
    "ragged-chunks": (13, 13, 5, None, 4),
    "labels": (13, 13, 5, 4, 5),
    "more-texts-than-images": (5, 11, 4, None, 3),
    "fewer-texts-than-images": (11, 4, 4, 3, 3),
    "one-pair": (1, 1, 3, None, None),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(shape: tuple, dtype: torch.dtype = F64, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
    """Return features, scale and bias, and the labels of both sides."""
    images, texts, dim, distinct, _ = shape
    u, v = (F.normalize(torch.randn(n, dim, dtype=F64), dim=-1).to(device, dtype) for n in (images, texts))
    wide = torch.promote_types(dtype, torch.float32)
    scalars = [torch.tensor(value, dtype=wide, device=device) for value in (9.0, -4.0)]
    if distinct is None:
        return [u, v, *scalars], {}
    labels, text_labels = (torch.randint(distinct, (n,), device=device) * 2**61 - 2**62 for n in (images, texts))
    return [u, v, *scalars], {"labels": labels, "text_labels": text_labels}


def with_gradients(function, tensors: list[Tensor], options: dict[str, Any], **more: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves, **options, **more)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@shapes
def test_value_and_gradients_are_those_of_the_definition(shape, device):
    tensors, options = inputs(shape, device=device)
    got = with_gradients(sigmoid_loss, tensors, options, chunk_size=shape[-1])
    for name, x, y in zip(NAMES, got, with_gradients(sigmoid_loss_reference, tensors, options), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_definition_is_siglips_sum_over_all_pairs():
    (u, v, scale, bias), options = inputs((5, 7, 4, 3, None))
    total = 0.0
    for i, a in enumerate(u):
        for j, b in enumerate(v):
            z = 1 if options["labels"][i] == options["text_labels"][j] else -1
            total += math.log1p(math.exp(-z * float(scale * (a @ b) + bias)))
    assert float(sigmoid_loss_reference(u, v, scale, bias, **options)) == pytest.approx(total / 5, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_as_the_eager_definition(dtype, device):
    tensors, options = inputs((64, 64, 16, 20, 24), dtype, device)
    exact = with_gradients(sigmoid_loss_reference, [x.double() for x in tensors], options)
    eager = with_gradients(sigmoid_loss_reference, tensors, options)
    got = with_gradients(sigmoid_loss, tensors, options, chunk_size=24)
    assert got[0].dtype == got[3].dtype == got[4].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for name, x, y, z in zip(NAMES, got, eager, exact, strict=True):
        error, allowed = ((t.double() - z).norm() / z.norm() for t in (x, y))
        assert error <= 2 * allowed + 1e-6, f"{name} in {dtype}: error {error:.2e}, eager's {allowed:.2e}"


def test_each_subset_of_gradients_is_that_of_all():
    tensors, options = inputs((7, 7, 4, 3, 3))
    everything = with_gradients(sigmoid_loss, tensors, options, chunk_size=3)[1:]
    for chosen in range(1, 2**4 - 1):
        needs = [bool(chosen >> place & 1) for place in range(4)]
        leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        sigmoid_loss(*leaves, **options, chunk_size=3).backward()
        for leaf, need, wanted in zip(leaves, needs, everything, strict=True):
            assert leaf.grad is None if not need else torch.equal(leaf.grad, wanted), needs


@pytest.mark.parametrize("function", [sigmoid_loss, sigmoid_loss_reference], ids=lambda f: f.__name__)
def test_gradcheck(function):
    tensors, options = inputs((5, 4, 3, 2, 2))
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: function(*x, **options, chunk_size=2), leaves)


def test_no_tensor_is_larger_than_the_features_or_a_tile():
    tensors, _ = inputs((128, 128, 2, None, None), torch.float32)
    leaves = [x.requires_grad_() for x in tensors]

    def largest_allocation(chunk_size: int) -> int:
        # The scratch memory of oneDNN's products in "cpp" is larger than everything here, but not at real sizes.
        with torch.profiler.profile(profile_memory=True) as profile, ops.backend("torch"):
            sigmoid_loss(*leaves, chunk_size=chunk_size).backward()
        return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")

    assert largest_allocation(128) >= 4 * 128 * 128, "the profiler no longer sees what the op allocates"
    assert largest_allocation(16) <= 2 * 8 * 128


def test_autocast_changes_nothing_and_strides_neither():
    tensors, options = inputs((16, 16, 8, 5, 6), torch.float32)
    wanted = with_gradients(sigmoid_loss, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            torch.equal(x, y) for x, y in zip(with_gradients(sigmoid_loss, tensors, options), wanted, strict=True)
        )
    turned = [x.T.contiguous().T if x.ndim == 2 else x for x in tensors]
    for x, y in zip(with_gradients(sigmoid_loss, turned, options), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_opcheck(device):
    tensors, options = inputs((6, 5, 4, 3, None), torch.float32, device)
    arguments = (*(x.requires_grad_() for x in tensors), *options.values(), 4, "torch")
    torch.library.opcheck(torch.ops.florence_fast.sigmoid_loss.default, arguments)


def test_opcheck_of_the_backward_with_strided_features():
    (u, v, scale, bias), options = inputs((6, 5, 4, 3, None), torch.float32)
    tensors = (u.T.contiguous().T, v.T.contiguous().T, scale, bias, *options.values())
    arguments = (torch.randn(6), *tensors, [True, False, True, True, False, False], 4, "torch")
    torch.library.opcheck(torch.ops.florence_fast.sigmoid_loss_backward.default, arguments)


@pytest.mark.parametrize("distinct", [None, 3])
def test_compiles_into_one_graph(distinct):
    tensors, options = inputs((6, 6, 4, distinct, None))
    compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")
    wanted = with_gradients(sigmoid_loss, tensors, options, chunk_size=4)
    for x, y in zip(with_gradients(compiled, tensors, options, chunk_size=4), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)


def test_reference_backend_is_the_definition_and_can_be_differentiated_twice():
    tensors, options = inputs((5, 5, 3, 2, None))
    with ops.backend("reference"):
        assert sigmoid_loss(*tensors, **options) == sigmoid_loss_reference(*tensors, **options)
        leaves = [x.requires_grad_() for x in tensors]
        assert torch.autograd.gradgradcheck(lambda *x: sigmoid_loss(*x, **options), leaves)


def test_a_backend_without_a_kernel_is_refused():
    tensors, options = inputs((4, 4, 3, None, None))
    with (
        ops.backend("cpp"),
        pytest.raises(RuntimeError, match="cannot run sigmoid_loss"),
    ):
        sigmoid_loss(*tensors, **options)


def test_the_table_of_ops_can_call_it(device):
    entry = ops.OPS["sigmoid_loss"]
    args, kwargs = entry.example(device)
    torch.testing.assert_close(entry.function(*args, **kwargs), entry.reference(*args, **kwargs))


U, Y = torch.eye(4), torch.arange(4)
BAD = {
    "no-tensor": ((None, U, 1.0, 0.0), {}, TypeError, "image_features must be a floating-point tensor, got NoneType"),
    "empty": ((U[:0], U, 1.0, 0.0), {}, ValueError, "image_features must hold at least one pair"),
    "width": ((U, U[:, :3], 1.0, 0.0), {}, ValueError, r"text_features must have shape \(N, 4\), got \(4, 3\)"),
    "dtypes": ((U, U.double(), 1.0, 0.0), {}, ValueError, "text_features must have the dtype of image_features"),
    "two-biases": ((U, U, 1.0, torch.ones(2)), {}, ValueError, r"logit_bias must be one .* got shape \(2,\)"),
    "labels-dtype": ((U, U, 1.0, 0.0, Y.int()), {}, TypeError, "labels must be an int64 tensor, got torch.int32"),
    "too-few-texts": ((U, U[:3], 1.0, 0.0), {}, ValueError, "text_features must hold at least the 4 texts"),
    "no-text-labels": ((U, U[:3], 1.0, 0.0, Y), {}, ValueError, "text_labels must be given, one for each of the 3"),
    "chunk": ((U, U, 1.0, 0.0), {"chunk_size": 0}, ValueError, "chunk_size must be a positive int, got 0"),
}


@pytest.mark.parametrize("args, kwargs, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        sigmoid_loss(*args, **kwargs)
