"""What window attention computes: the definition against a loop over tokens and against Hugging Face's Swin, the
``torch`` backend against the definition, in values and in every gradient.

Letters: B batch · C channels · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.ops.window_attention import torch as window_attention_torch
from tests.ops.rounding import relative_error

HEADS, HEAD_DIM = 2, 3


@dataclass(frozen=True)
class Case:
    """One way to call the op, small enough for a loop over pairs of tokens."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    pad_mode: str = "mask"
    cyclic: tuple[bool, ...] = ()
    term: str = "table"
    cosine: bool = False
    scale: float | None = None

    def make(self, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw the tensors, which ask for gradients, and give the other arguments."""
        channels = 3 * HEADS * HEAD_DIM
        tokens, offsets = math.prod(self.window), math.prod(2 * w - 1 for w in self.window)
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {"qkv": torch.randn(batch, *self.size, channels, dtype=dtype)}
        if self.term == "table":
            tensors["rel_pos_bias_table"] = torch.randn(offsets, HEADS, dtype=wide)
        if self.term == "bias":
            tensors["bias"] = torch.randn(HEADS, tokens, tokens, dtype=wide)
        if self.cosine:
            tensors["logit_scale"] = torch.tensor([1.0, 5.0], dtype=wide)  # the second is beyond log(100)
        if self.pad_mode == "bias":
            tensors["qkv_bias"] = torch.randn(channels, dtype=dtype)
        values = {"window_size": self.window, "num_heads": HEADS, "shift_size": self.shift, "scale": self.scale}
        values |= {"pad_mode": self.pad_mode, "cyclic": self.cyclic or False}
        return {name: x.requires_grad_() for name, x in tensors.items()}, values


CASES = {
    "window-exact": Case((4, 3), (4, 3), (2, 1)),
    "no-bias-own-scale": Case((4, 6), (2, 3), (0, 0), term="none", scale=0.7),
    "shift-one-axis": Case((4, 6), (2, 3), (0, 1)),
    "ragged-masked": Case((5, 7), (3, 4), (0, 0)),
    "ragged-masked-shifted": Case((5, 7), (3, 4), (1, 2), term="bias"),
    "ragged-filled": Case((5, 7), (3, 4), (0, 0), pad_mode="bias", term="bias"),
    "ragged-filled-shifted": Case((5, 7), (3, 4), (1, 2), pad_mode="bias"),
    "cyclic-columns": Case((4, 6), (2, 3), (1, 2), cyclic=(False, True)),
    "cyclic-ragged-cosine": Case((5, 7), (3, 4), (1, 2), cyclic=(True, False), cosine=True),
    "map-smaller": Case((2, 6), (3, 4), (1, 2)),
    "map-smaller-whole-bias": Case((2, 1), (3, 4), (1, 2), term="bias", pad_mode="bias"),
    "cosine": Case((5, 4), (3, 2), (1, 1), cosine=True, pad_mode="bias"),
    "video": Case((3, 4, 5), (2, 2, 3), (1, 0, 2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def loop_over_tokens(qkv, window_size, num_heads, shift_size, scale, pad_mode, cyclic, **terms) -> Tensor:
    """Attend token by token, in coordinates of the map: shares no code with the package."""
    size, axes = qkv.shape[1:-1], range(qkv.ndim - 2)
    cyclic = cyclic or (False,) * len(axes)
    window = [min(n, w) for n, w in zip(size, window_size, strict=True)]
    shift = [0 if n <= w else s for n, w, s in zip(size, window_size, shift_size, strict=True)]
    padded = [math.ceil(n / w) * w for n, w in zip(size, window, strict=True)]
    table, bias, log = (terms.get(name) for name in ("rel_pos_bias_table", "bias", "logit_scale"))
    everywhere = list(itertools.product(*map(range, padded)))
    is_real = {x: all(x[a] < size[a] for a in axes) for x in everywhere}
    rolled = {x: [(x[a] - shift[a]) % padded[a] for a in axes] for x in everywhere}
    number = {x: i for i, x in enumerate(itertools.product(*map(range, window_size)))}

    def meet(x, y):
        if any(rolled[x][a] // window[a] != rolled[y][a] // window[a] for a in axes):
            return False
        if any((x[a] < shift[a]) != (y[a] < shift[a]) and not cyclic[a] for a in axes):
            return False
        return is_real[y] or pad_mode == "bias"

    def added(x, y, head):
        i, j = ([rolled[z][a] % window[a] for a in axes] for z in (x, y))
        if table is not None:
            row = 0
            for a in axes:
                row = row * (2 * window_size[a] - 1) + i[a] - j[a] + window_size[a] - 1
            return table[row, head]
        return 0 if bias is None else bias[head, number[tuple(i)], number[tuple(j)]]

    def score(q, k, head):
        if log is None:
            return q.dot(k) * (len(q) ** -0.5 if scale is None else scale)
        return q.dot(k) / (q.norm() * k.norm()) * min(math.exp(log[head]), 100)

    out = torch.empty(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=qkv.dtype)
    for b in range(len(qkv)):
        token = {x: (qkv[(b, *x)] if is_real[x] else terms.get("qkv_bias")) for x in everywhere}
        for x, head in itertools.product(filter(is_real.get, everywhere), range(num_heads)):
            seen = [y for y in everywhere if meet(x, y)]
            q, k, v = (
                {y: token[y].view(3, num_heads, -1)[part, head] for y in ([x] if part == 0 else seen)}
                for part in range(3)
            )
            weights = torch.stack([score(q[x], k[y], head) + added(x, y, head) for y in seen]).softmax(0)
            value = sum(w * v[y] for w, y in zip(weights, seen, strict=True))
            out[(b, *x)].view(num_heads, -1)[head] = value
    return out


def gradients(function, tensors: dict[str, Tensor], values: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    """Give the gradient of every tensor that asks for one."""
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    out = function(**tensors, **values)
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


@cases
@torch.no_grad()
def test_reference_equals_a_loop_over_tokens(case: Case) -> None:
    tensors, values = case.make(batch=1)
    out = ops.window_attention_reference(**tensors, **values)
    torch.testing.assert_close(out, loop_over_tokens(**tensors, **values), rtol=1e-12, atol=1e-12)


@cases
def test_torch_backend_equals_reference(case: Case, poisoned_memory: None) -> None:
    tensors, values = case.make()
    exact = ops.window_attention_reference(**tensors, **values)
    with ops.backend("torch"):
        torch.testing.assert_close(ops.window_attention(**tensors, **values), exact, rtol=1e-11, atol=1e-12)
        grad_out = torch.randn_like(exact)
        grads = gradients(ops.window_attention, tensors, values, grad_out)
    exact_grads = gradients(ops.window_attention_reference, tensors, values, grad_out)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact_grads[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("by_sdpa", [True, False], ids=["sdpa", "products"])
@cases
@torch.no_grad()
def test_inference_equals_reference(case: Case, by_sdpa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention_torch, "_prefers_sdpa", lambda *_: by_sdpa)
    tensors, values = case.make()
    exact = ops.window_attention_reference(**tensors, **values)
    torch.testing.assert_close(ops.window_attention(**tensors, **values), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["ragged-filled-shifted", "ragged-masked-shifted", "cosine", "map-smaller"])
def test_reference_gradcheck(name: str) -> None:
    tensors, values = CASES[name].make(batch=1)
    torch.autograd.gradcheck(
        lambda *x: ops.window_attention_reference(**dict(zip(tensors, x, strict=True)), **values),
        tuple(tensors.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("name", ["ragged-filled", "ragged-filled-shifted", "cosine"])
def test_every_subset_of_gradients(name: str) -> None:
    tensors, values = CASES[name].make()
    grad_out = torch.randn_like(ops.window_attention_reference(**tensors, **values))
    exact = gradients(ops.window_attention_reference, tensors, values, grad_out)
    for count in range(1, len(tensors)):
        for subset in itertools.combinations(tensors, count):
            some = {n: x.detach().requires_grad_(n in subset) for n, x in tensors.items()}
            grads = gradients(ops.window_attention, some, values, grad_out)
            assert set(grads) == set(subset)
            for n, grad in grads.items():
                torch.testing.assert_close(grad, exact[n], rtol=1e-10, atol=1e-11, msg=lambda m, s=subset: f"{s}: {m}")


@pytest.mark.parametrize("name", ["ragged-filled-shifted", "ragged-masked-shifted", "cosine"])
def test_slices_of_the_batch_join(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, values = CASES[name].make(batch=5)
    exact = ops.window_attention_reference(**tensors, **values)
    grad_out = torch.randn_like(exact)
    exact_grads = gradients(ops.window_attention_reference, tensors, values, grad_out)
    bytes_per_image = 4 * HEADS * math.prod(CASES[name].window) ** 2 * 8
    monkeypatch.setattr(window_attention_torch, "SLICE_BYTES", 2 * bytes_per_image)
    torch.testing.assert_close(ops.window_attention(**tensors, **values), exact, rtol=1e-11, atol=1e-12)
    for n, grad in gradients(ops.window_attention, tensors, values, grad_out).items():
        torch.testing.assert_close(grad, exact_grads[n], rtol=1e-10, atol=1e-11)


def test_table_gradient_is_bit_equal_over_runs() -> None:
    heads, threads = 24, torch.get_num_threads()
    qkv, table = torch.randn(4, 16, 16, 3 * heads * 2), torch.randn(225, heads, requires_grad=True)
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(10):
            out = ops.window_attention(qkv, table, window_size=8, num_heads=heads, shift_size=4)
            runs.append(torch.autograd.grad(out.square().sum(), table)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def plain_attention(qkv: Tensor, table: Tensor, side: int, num_heads: int) -> Tensor:
    """One window, computed in the dtype of ``qkv`` as one would write it down."""
    batch, channels = len(qkv), qkv.shape[-1] // 3
    place = torch.arange(side**2)
    row, column = place // side, place % side
    index = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
    q, k, v = qkv.view(batch, side**2, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q * (q.shape[-1] ** -0.5) @ k.mT + table[index].permute(2, 0, 1).to(qkv.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, side, side, channels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [2, 4, 8])
def test_low_precision_is_as_exact_as_plain_pytorch(dtype: torch.dtype, side: int) -> None:
    heads = 2
    qkv = torch.randn(8, side, side, 3 * heads * 16).to(dtype).requires_grad_()
    table = torch.randn((2 * side - 1) ** 2, heads, requires_grad=True)
    grad_out = torch.randn(8, side, side, heads * 16).to(dtype)
    exact_qkv, exact_table = (x.detach().double().requires_grad_() for x in (qkv, table))

    def run(function, *inputs, **values):
        out = function(*inputs, **values)
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))

    values = {"window_size": side, "num_heads": heads}
    exact = run(ops.window_attention_reference, exact_qkv, exact_table, **values)
    ours = run(ops.window_attention, qkv, table, **values)
    plain = run(plain_attention, qkv, table, side=side, num_heads=heads)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32]
    with torch.no_grad():
        inference = ops.window_attention(qkv, table, **values)
    assert relative_error(inference, exact[0]) <= 2 * relative_error(plain[0], exact[0])
    for name, allowed, x, y, z in zip(("out", "qkv", "table"), (2, 3, 3), ours, plain, exact, strict=True):
        error, usual = relative_error(x, z), relative_error(y, z)
        assert error <= allowed * usual, f"{name}: {error:.2e} against {usual:.2e} of plain PyTorch, {dtype}, {side}"


def test_cosine_in_bf16_is_computed_in_float32() -> None:
    tensors = {"qkv": torch.randn(2, 8, 8, 3 * 32).bfloat16(), "logit_scale": torch.full((2,), 4.6)}
    values = {"window_size": 8, "num_heads": 2}
    exact = ops.window_attention_reference(**{name: x.double() for name, x in tensors.items()}, **values)
    # Rounding the result to bf16 alone leaves 1.7e-3; scores up to 100 in bf16 leave 0.1.
    error = relative_error(ops.window_attention(**tensors, **values), exact)
    assert error < 4e-3, error


@pytest.mark.parametrize("shift", [0, 2], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("size", [(9, 13), (8, 12), (5, 7)], ids=str)
def test_equals_hugging_face_swin(size: tuple[int, int], shift: int) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=4, hidden_act="gelu")
    layer = swin.SwinLayer(config, dim=24, input_resolution=size, num_heads=3, shift_size=shift).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention = layer.attention
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    table = attention.relative_position_bias.relative_position_bias_table

    def our_layer(x: Tensor) -> Tensor:
        qkv = nn.functional.linear(layer.layernorm_before(x).unflatten(1, size), weight, bias)
        options = {"window_size": 4, "num_heads": 3, "shift_size": shift, "pad_mode": "bias", "qkv_bias": bias}
        x = x + attention.o_proj(ops.window_attention(qkv, table, **options)).flatten(1, 2)
        return x + layer.mlp(layer.layernorm_after(x))

    x = torch.randn(2, size[0] * size[1], 24, requires_grad=True)
    theirs, ours = layer(x, size)[0], our_layer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs = (x, table, *(part.bias for part in parts))
    their_grads, our_grads = (torch.autograd.grad(y.square().mean(), inputs) for y in (theirs, ours))
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-5)
