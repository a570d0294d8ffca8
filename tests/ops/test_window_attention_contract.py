"""What window attention promises beside its values: torch.library's contract, compile, export, autocast,
checkpointing, and the words in which it refuses bad arguments.

Letters: B batch · C channels · h heads.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from florence_fast import ops

HEADS = 2
OPTIONS = {"window_size": 4, "num_heads": HEADS, "shift_size": 2}
FORWARD = torch.ops.florence_fast.window_attention.default
BACKWARD = torch.ops.florence_fast.window_attention_backward.default


def make_qkv(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, 3 * HEADS * 4, **kwargs)


def make_table(**kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(49, HEADS, **kwargs))


def attend(qkv: Tensor, table: Tensor) -> Tensor:
    return ops.window_attention(qkv, table, **OPTIONS)


def op_arguments(
    train: bool, table: bool = True, cosine: bool = False, filled: bool = True, video: bool = False
) -> tuple:
    """Give arguments of the registered op, every tensor asking for a gradient if ``train``."""
    size, window, shift = ((3, 4, 5), [2, 3, 4], [1, 0, 2]) if video else ((6, 9), [4, 4], [2, 1])
    offsets, tokens = (3 * 5 * 7, 24) if video else (49, 16)
    tensors = (
        make_qkv(2, *size),
        torch.randn(offsets, HEADS) if table else None,
        None if table else torch.randn(HEADS, tokens, tokens),
        torch.randn(HEADS) if cosine else None,
        torch.randn(3 * HEADS * 4) if filled else None,
    )
    tensors = tuple(x if x is None else x.requires_grad_(train) for x in tensors)
    values = (window, HEADS, shift, 0.5, "bias" if filled else "mask", [False] * len(size), train, "torch")
    return *tensors, *values


@pytest.mark.parametrize(
    "options",
    [
        {"train": True},
        {"train": True, "cosine": True, "filled": False},
        {"train": True, "table": False, "video": True},
        {"train": False},
    ],
    ids=str,
)
def test_opcheck(options: dict[str, bool]) -> None:
    torch.library.opcheck(FORWARD, op_arguments(**options))


def test_what_is_kept_gets_no_gradient() -> None:
    out, kept = FORWARD(*op_arguments(train=True))
    assert out.requires_grad and not kept.requires_grad


class ContiguityOfGradients(TorchDispatchMode):
    """Record whether the gradient that reaches the backward is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is BACKWARD:
            self.seen.append(args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_backward_sees_contiguous_gradients() -> None:
    out = attend(make_qkv(2, 6, 9, requires_grad=True), make_table())
    with ContiguityOfGradients() as recorder:
        out.sum().backward()
    assert recorder.seen == [True]


def test_opcheck_backward() -> None:
    *tensors, window, heads, shift, scale, pad_mode, cyclic, _, backend = op_arguments(train=False, cosine=True)
    kept = FORWARD(*tensors, window, heads, shift, scale, pad_mode, cyclic, True, backend)[1]
    grad_out = torch.randn(2, 6, 9, HEADS * 4)
    for needs in ([True, True, False, True, True], [False, True, False, False, False]):
        values = (window, heads, shift, scale, pad_mode, cyclic, True, backend)
        torch.library.opcheck(BACKWARD, (grad_out, *tensors, kept, needs, *values))


def test_compiles_once_for_every_batch_and_larger_map() -> None:
    counter, table = CompileCounterWithBackend("aot_eager"), make_table()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 6, 9), (3, 6, 9), (7, 12, 8), (2, 7, 7), (2, 21, 33)):
        qkv = make_qkv(*shape, requires_grad=True)
        inputs = (qkv, table)
        out, expected = compiled(*inputs), attend(*inputs)
        assert torch.equal(out, expected), shape
        grads, expected_grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
        assert all(map(torch.equal, grads, expected_grads)), shape
        assert counter.frame_count == 1, f"compiled again for {shape}"


def test_compiled_function_follows_the_forced_backend() -> None:
    counter, table, qkv = CompileCounterWithBackend("aot_eager"), make_table(), make_qkv(2, 6, 9)
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    compiled(qkv, table)
    with ops.backend("reference"):
        compiled(qkv, table)
    names = [{str(node.target) for node in graph.graph.nodes} for graph in counter.graphs]
    assert [any("florence_fast.window_attention" in name for name in graph) for graph in names] == [True, False]


def test_inductor() -> None:
    qkv, table = make_qkv(2, 6, 9, requires_grad=True), make_table()
    out = torch.compile(attend, fullgraph=True)(qkv, table)
    torch.testing.assert_close(out, attend(qkv, table))
    grads = [torch.autograd.grad(y.square().sum(), (qkv, table)) for y in (out, attend(qkv, table))]
    torch.testing.assert_close(*grads)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = make_table()

    def forward(self, qkv: Tensor) -> Tensor:
        return attend(qkv, self.table)


def test_export_with_dynamic_sizes() -> None:
    module = Attention()
    dims = {0: Dim("batch", min=2), 1: Dim("height", min=2), 2: Dim("width", min=2)}
    exported = torch.export.export(module, (make_qkv(2, 6, 9),), dynamic_shapes=(dims,)).module()
    for shape in ((3, 5, 11), (4, 3, 2)):
        qkv = make_qkv(*shape)
        assert torch.equal(exported(qkv), module(qkv)), shape


def test_meta_device() -> None:
    qkv, table = make_qkv(2, 6, 9, device="meta", requires_grad=True), make_table(device="meta")
    out = attend(qkv, table)
    assert out.shape == (2, 6, 9, HEADS * 4) and out.device.type == "meta"
    grads = torch.autograd.grad(out.sum(), (qkv, table))
    assert [grad.shape for grad in grads] == [qkv.shape, table.shape]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_casts_qkv_alone(backend: str) -> None:
    qkv, table = make_qkv(2, 6, 9, requires_grad=True), make_table()
    logit_scale = torch.full((HEADS,), 4.0, requires_grad=True)
    inputs, options = (qkv, table, logit_scale), {**OPTIONS, "logit_scale": logit_scale}
    with ops.backend(backend):
        expected = ops.window_attention(qkv.bfloat16(), table, **options)
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.window_attention(qkv, table, **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    # A backward inside autocast is the torch backend's promise; the reference is differentiated by autograd.
    with torch.autocast("cpu", torch.bfloat16, enabled=backend == "torch"):
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.float().square().sum(), inputs)))


def test_autocast_leaves_float64_alone() -> None:
    qkv, table = make_qkv(1, 6, 9, dtype=torch.float64), make_table()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(qkv, table)
    assert torch.equal(out, attend(qkv, table))


def test_activation_checkpointing() -> None:
    inputs = (make_qkv(2, 6, 9, requires_grad=True), make_table())
    plain, checkpointed = attend(*inputs), checkpoint(attend, *inputs, use_reentrant=False)
    assert torch.equal(plain, checkpointed)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (plain, checkpointed)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", [(6, 9), (8, 8, 8), (8, 8)], ids=str)
def test_empty_batch(size: tuple[int, ...], backend: str) -> None:
    window = (2, 8, 8)[-len(size) :]
    table = torch.randn(3 * 225 if len(size) == 3 else 225, HEADS, requires_grad=True)
    qkv = make_qkv(0, *size, requires_grad=True)
    with ops.backend(backend):
        out = ops.window_attention(qkv, table, window_size=window, num_heads=HEADS)
        with torch.no_grad():
            inference = ops.window_attention(qkv, table, window_size=window, num_heads=HEADS)
    assert out.shape == inference.shape == (0, *size, HEADS * 4)
    grad_qkv, grad_table = torch.autograd.grad(out.sum(), (qkv, table))
    assert grad_qkv.shape == qkv.shape and not grad_table.any()


@pytest.mark.parametrize("shape", [(2, 6, 9), (1, 1, 1)], ids=str)
def test_any_strides_and_the_input_is_left_alone(shape: tuple[int, ...]) -> None:
    table = make_table()
    qkv = make_qkv(*shape).transpose(1, 2).contiguous().transpose(1, 2)
    before = qkv.clone()
    out = attend(qkv, table)
    assert out.is_contiguous() and torch.equal(out, attend(before.clone().contiguous(), table))
    assert torch.equal(qkv, before)


MAPS = {
    "tall": (14, 7), "wide": (7, 14), "one column": (9, 1), "one row": (1, 9), "one token": (1, 1),
    "tall 3-D": (4, 14, 7), "long": (8, 7, 7), "wide 3-D": (2, 7, 14), "one column 3-D": (5, 9, 1),
    "one line": (9, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize(
    ("name", "train"), [("torch", False), ("torch", True), ("cpp", False), ("cpp", True), ("triton", False)]
)
def test_maps_of_every_shape(name: str, train: bool, size: tuple[int, ...]) -> None:
    window = (7,) * len(size) if len(size) == 2 else (2, 7, 7)
    torch.manual_seed(0)
    qkv, table = torch.randn(2, *size, 3 * 2 * 16), torch.randn(math.prod(2 * w - 1 for w in window), 2)
    options: dict[str, Any] = {"window_size": window, "num_heads": 2, "shift_size": tuple(w // 2 for w in window)}
    reasons = ops.OPS["window_attention"].unsupported_reasons(name, qkv, table, **options)
    if reasons:
        pytest.skip("; ".join(reasons))
    leaf = qkv.clone().requires_grad_(train)
    with ops.backend(name):
        out = ops.window_attention(leaf, table, **options)
    expected = ops.window_attention_reference(qkv, table, **options)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-4)
    if train:
        reference = qkv.clone().requires_grad_()
        ops.window_attention_reference(reference, table, **options).sin().sum().backward()
        out.sin().sum().backward()
        torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_the_reference() -> None:
    qkv, table = make_qkv(1, 6, 9, requires_grad=True), make_table()

    def second_derivative() -> Tensor:
        (grad,) = torch.autograd.grad(attend(qkv, table).square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), table)[0]

    found = second_derivative()
    with ops.backend("reference"):
        wanted = second_derivative()
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


GOOD = {"qkv": make_qkv(2, 6, 9), "window_size": 4, "num_heads": HEADS}
BAD = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor, got list"),
    ({"qkv": make_qkv(6, 9)}, ValueError, "qkv must have shape (B, H, W, 3*C) or (B, T, H, W, 3*C)"),
    ({"num_heads": 5}, ValueError, "with C divisible by num_heads=5, got (2, 6, 9, 24)"),
    ({"num_heads": 0}, ValueError, "num_heads must be a positive int, got 0"),
    ({"qkv": make_qkv(2, 0, 9)}, ValueError, "qkv must have a map of at least one token, got shape (2, 0, 9, 24)"),
    ({"qkv": make_qkv(2, 6, 9).long()}, TypeError, "qkv must be a floating-point tensor, got torch.int64"),
    ({"window_size": 4.0}, ValueError, "window_size must be one int or 2 of them, one per axis of the map, got 4.0"),
    ({"window_size": (4, 4, 4)}, ValueError, "window_size must be one int or 2 of them"),
    ({"window_size": 0}, ValueError, "window_size must be positive on every axis, got 0"),
    ({"shift_size": 4}, ValueError, "shift_size must be in [0, window_size) on every axis, got 4 for 4"),
    ({"shift_size": (0, -1)}, ValueError, "shift_size must be in [0, window_size) on every axis, got (0, -1)"),
    ({"cyclic": "rows"}, ValueError, "cyclic must be one bool or 2 of them, one per axis of the map, got 'rows'"),
    ({"pad_mode": "biass"}, ValueError, "unknown pad_mode 'biass' (did you mean 'bias'?)"),
    ({"pad_mode": "bias"}, ValueError, "pad_mode='bias' fills the pads with qkv_bias, which must be given"),
    ({"qkv_bias": torch.zeros(24)}, ValueError, "qkv_bias only fills the pads of pad_mode='bias'"),
    (
        {"qkv_bias": torch.zeros(8), "pad_mode": "bias"},
        ValueError,
        "qkv_bias must have shape (24,), got (8,)",
    ),
    (
        {"rel_pos_bias_table": torch.zeros(48, HEADS)},
        ValueError,
        "rel_pos_bias_table must have shape (49, 2), got (48, 2)",
    ),
    ({"rel_pos_bias_table": 0.5}, TypeError, "rel_pos_bias_table must be a floating-point tensor, got float"),
    ({"rel_pos_bias_table": make_table(device="meta")}, ValueError, "must be on the device of qkv, cpu, got meta"),
    ({"bias": torch.zeros(HEADS, 15, 16)}, ValueError, "bias must have shape (2, 16, 16), got (2, 15, 16)"),
    (
        {"bias": torch.zeros(HEADS, 16, 16), "rel_pos_bias_table": make_table()},
        ValueError,
        "rel_pos_bias_table and bias cannot both be given",
    ),
    ({"logit_scale": torch.zeros(3)}, ValueError, "logit_scale must have shape (2,) or (2, 1, 1), got (3,)"),
    ({"logit_scale": torch.zeros(2), "scale": 1.0}, ValueError, "scale and logit_scale cannot both be given"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:48] for *_, message in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    function: Callable[..., Tensor] = ops.window_attention
    with pytest.raises(error, match=re.escape(message)):
        function(**{**GOOD, **change})
