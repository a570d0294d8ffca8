"""Native kernels on tensors of more than 2^31 elements, against the same kernels on the parts where 32 bits end.

Values repeat after a number of rows that divides no power of two: an address that lost its upper bits shows.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from florence_fast import native, ops
from florence_fast.ops.deform_conv2d import cpp as deform_conv2d_cpp
from florence_fast.ops.l2_normalize import cpp as l2_normalize_cpp
from florence_fast.ops.layer_norm import cpp as layer_norm_cpp
from florence_fast.ops.mlp import cpp as mlp_cpp

LIMIT = 2**31
GIGABYTES = 16  # that must be free; a test takes up to 12


def available() -> float:
    """Memory that the system could give, in gigabytes; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


@pytest.fixture(autouse=True)
def room() -> None:
    if available() < GIGABYTES:
        pytest.skip(f"needs {GIGABYTES} GB of free memory")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]


def repeated(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers that begin anew after a prime number of rows."""
    x, block = torch.empty(shape, dtype=dtype), torch.randn(1009, *shape[1:]).to(dtype)
    for part in x.split(len(block)):
        part.copy_(block[: len(part)])
    return x


def rows_at_the_ends(num_rows: int, columns: int) -> list[slice]:
    """The first rows, those in the middle of which element 2^31 lies, and the last."""
    middle = LIMIT // columns
    assert middle + 3 < num_rows, "too small to be of use"
    return [slice(0, 5), slice(middle - 3, middle + 3), slice(num_rows - 5, num_rows)]


def parts(num_rows: int) -> list[slice]:
    """All rows, in parts that 32 bits count the elements of."""
    return [slice(i, min(i + num_rows // 8 + 1, num_rows)) for i in range(0, num_rows, num_rows // 8 + 1)]


def assert_equal(got: Tensor, wanted: Tensor, at: slice) -> None:
    assert torch.equal(got, wanted), f"rows {at}: {got} instead of {wanted}"


def assert_same_sum(got: Tensor, terms: list[Tensor]) -> None:
    """A sum over all rows is that of sums over parts."""
    wanted, rounding = torch.stack(terms).double().sum(0), max(1e-3, 2 * torch.finfo(got.dtype).eps)
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=1e-4 * wanted.abs().max().item())


def inputs() -> tuple[Tensor, Tensor]:
    """Rows, and as many for the gradient of a result; they share memory, of which there is little."""
    rows = repeated(LIMIT // 1000 + 91, 1000)
    return rows[1:], rows[:-1]


def test_layer_norm() -> None:
    (x, grad), weight, bias, eps = inputs(), torch.randn(1000), torch.randn(1000), 1e-5

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        norm, _, mean, rstd = layer_norm_cpp.layer_norm_fwd(x, None, None, weight, bias, eps, x.dtype, x.dtype)
        return norm, mean, rstd

    def backward(at: slice, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        rows = (grad[at], None, x[at], None, weight, None, x.dtype, True, eps, mean[at], rstd[at])
        _, dx, d_weights = layer_norm_cpp.layer_norm_bwd(*rows)
        return dx, d_weights

    norm, mean, rstd = forward(x)
    for at in rows_at_the_ends(*x.shape):
        for got, wanted in zip((norm, mean, rstd), forward(x[at]), strict=True):
            assert_equal(got[at], wanted, at)
    del norm, got
    dx, d_weights = backward(slice(None), mean, rstd)
    for at in rows_at_the_ends(*x.shape):
        assert_equal(dx[at], backward(at, mean, rstd)[0], at)
    del dx
    assert_same_sum(d_weights, [backward(at, mean, rstd)[1] for at in parts(len(x))])


def test_l2_normalize() -> None:
    (x, grad), eps = inputs(), 1e-12
    out, length = l2_normalize_cpp.l2_normalize_fwd(x, eps, x.dtype)
    for at in rows_at_the_ends(*x.shape):
        for got, wanted in zip((out, length), l2_normalize_cpp.l2_normalize_fwd(x[at], eps, x.dtype), strict=True):
            assert_equal(got[at], wanted, at)
    del out, got
    dx = l2_normalize_cpp.l2_normalize_bwd(grad, x, length, eps, x.dtype)
    for at in rows_at_the_ends(*x.shape):
        assert_equal(dx[at], l2_normalize_cpp.l2_normalize_bwd(grad[at], x[at], length[at], eps, x.dtype), at)


def test_bias_activation() -> None:
    (hidden, grad), bias = inputs(), torch.randn(1000).bfloat16()

    def backward(at: slice) -> tuple[Tensor, Tensor]:
        d_hidden, _, d_bias = mlp_cpp.bias_activation_bwd(grad[at], hidden[at], bias, "gelu", False, True)
        return d_hidden, d_bias

    places = rows_at_the_ends(*hidden.shape)
    d_hidden, d_bias = backward(slice(None))
    for at in places:
        assert_equal(d_hidden[at], backward(at)[0], at)
    del d_hidden
    assert_same_sum(d_bias, [backward(at)[1] for at in parts(len(hidden))])
    wanted = [mlp_cpp.bias_activation_fwd(hidden[at], bias, "gelu", False) for at in places]
    mlp_cpp.bias_activation_fwd(hidden, bias, "gelu", True)
    for at, rows in zip(places, wanted, strict=True):
        assert_equal(hidden[at], rows, at)


def test_mlp() -> None:
    x = repeated(LIMIT // 1000 + 90, 1000)
    parameters = [torch.randn(*shape).bfloat16() for shape in ((8, 1000), (8,), (3, 8), (3,))]
    out = ops.mlp(x, *parameters)
    for at in rows_at_the_ends(*x.shape):
        torch.testing.assert_close(out[at], ops.mlp(x[at], *parameters), rtol=0.02, atol=0.02)


def test_patch_merging() -> None:
    x = repeated(LIMIT // (15 * 16 * 8) + 9, 15, 16, 8).requires_grad_()
    parameters = [torch.randn(*shape).requires_grad_() for shape in ((32,), (32,), (16, 32))]
    parameters[2] = parameters[2].detach().bfloat16().requires_grad_()

    def results(x: Tensor) -> tuple[Tensor, ...]:
        out = ops.patch_merging(x, *parameters)
        return out, *torch.autograd.grad(out, (x, *parameters), out.detach())

    out, dx, *d_parameters = results(x)
    for at in rows_at_the_ends(len(x), x[0].numel()):
        wanted = results(x[at])
        assert_equal(out[at], wanted[0], at)
        assert_equal(dx[at], wanted[1], at)
    del out, dx
    terms = [results(x[at])[2:] for at in parts(len(x))]
    for got, term in zip(d_parameters, zip(*terms, strict=True), strict=True):
        assert_same_sum(got, list(term))


@pytest.mark.parametrize("logit_scale", [False, True], ids=["dot", "cosine"])
def test_window_attention(logit_scale: bool) -> None:
    heads, window = 2, 7
    qkv = repeated(LIMIT // (13 * 14 * 3 * 64) + 9, 13, 14, 3 * 64).requires_grad_()
    table = torch.randn((2 * window - 1) ** 2, heads).requires_grad_()
    scale = {"logit_scale": torch.ones(heads).requires_grad_()} if logit_scale else {}
    leaves = [table, *scale.values()]

    def results(qkv: Tensor) -> tuple[Tensor, ...]:
        out = ops.window_attention(qkv, table, window_size=window, num_heads=heads, shift_size=3, **scale)
        return out, *torch.autograd.grad(out, (qkv, *leaves), out.detach())

    out, dqkv, *d_leaves = results(qkv)
    for at in rows_at_the_ends(len(qkv), qkv[0].numel()):
        wanted = results(qkv[at])
        assert_equal(out[at], wanted[0], at)
        assert_equal(dqkv[at], wanted[1], at)
    del out, dqkv
    terms = [results(qkv[at])[2:] for at in parts(len(qkv))]
    for got, term in zip(d_leaves, zip(*terms, strict=True), strict=True):
        assert_same_sum(got, list(term))


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_loss"])
def test_logits_of_one_chunk(name: str) -> None:
    count = 46_400
    assert count**2 > LIMIT
    features = [torch.randn(count, 4, requires_grad=True) for _ in range(2)]
    scalars = [torch.tensor(1.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)]
    arguments = features + scalars[: 1 if name == "contrastive_loss" else 2]
    labels = torch.randint(0, count // 4, (count,))

    def results(chunk_size: int) -> tuple[Tensor, ...]:
        loss = ops.OPS[name].function(*arguments, labels, chunk_size=chunk_size)
        return loss, *torch.autograd.grad(loss, arguments)

    for got, wanted in zip(results(count), results(4096), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_nms() -> None:
    """The pairs of boxes are more than 2^31; the last boxes lie apart, so that they are on their own."""
    count, last = 70_000, 3_000
    assert count**2 > LIMIT
    corners = torch.rand(count, 2) * 600
    corners[-last:] = corners[-last:] * 0.2 + 10_000
    boxes, scores = torch.cat([corners, corners + 1 + 4 * torch.rand(count, 2)], 1), torch.rand(count)
    scores[-last:] -= 1
    kept = ops.nms(boxes, scores, 0.3)
    apart = kept[kept >= count - last]
    assert_equal(kept[-len(apart) :], apart, slice(-last, None))
    assert_equal(apart - (count - last), ops.nms(boxes[-last:], scores[-last:], 0.3), slice(-last, None))
    assert last // 10 < len(apart) < last


def test_columns_of_deform_conv2d() -> None:
    batch, side, channels, geometry = 64, 242, 64, ([3, 3], [1, 1], [1, 1], [1, 1])
    places = side * side
    assert batch * places * 9 * channels > LIMIT
    x = repeated(batch * places, channels).view(batch, side, side, channels)
    offset, mask = repeated(batch, 18, side, side, dtype=torch.float32), torch.rand(batch, 9, side, side)
    ends = [slice(0, 1), slice(batch - 1, batch)]
    columns = deform_conv2d_cpp.sample(x, offset, mask, *geometry)
    for at in ends:
        assert_equal(columns[at], deform_conv2d_cpp.sample(x[at], offset[at], mask[at], *geometry), at)

    def gradients(at: slice) -> tuple[Tensor, ...]:
        tensors = columns[at], x[at], offset[at], mask[at]
        of_samples = deform_conv2d_cpp.sample_gradients(*tensors, *geometry, False)[1:]
        return *of_samples, deform_conv2d_cpp.input_gradient(columns[at], (side, side), *tensors[2:], *geometry)

    for at in ends:
        for got, wanted in zip(gradients(slice(None)), gradients(at), strict=True):
            assert_equal(got[at], wanted, at)


def test_map_of_deform_conv2d() -> None:
    side, geometry = 32_800, ([1, 1], [32_799, 32_799], [0, 0], [1, 1])  # the four corners of the map
    x = repeated(side, side, 2).unsqueeze(0)
    assert x.numel() > LIMIT
    offset = torch.zeros(1, 2, 2, 2)
    columns = deform_conv2d_cpp.sample(x, offset, None, *geometry)
    assert_equal(columns.view(2, 2, 2), x[0, :: side - 1, :: side - 1], slice(None))
    corners = x[0, :: side - 1, :: side - 1].clone()
    del x
    d_map = deform_conv2d_cpp.input_gradient(columns, (side, side), offset, None, *geometry)
    assert_equal(d_map[0, :: side - 1, :: side - 1], corners.float(), slice(None))
    assert d_map[0, -1, 1:-1].count_nonzero() == d_map[0, side // 2 :, 1:-1].count_nonzero() == 0
