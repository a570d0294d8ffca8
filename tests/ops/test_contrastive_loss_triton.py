"""The Triton kernels of the contrastive loss against the float64 definition, through the interpreter on a CPU and on a
GPU where there is one.

Letters: B pairs · R rows · N columns · D embedding dim.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels.targets import H200, assume
from florence_fast.ops.contrastive_loss import (
    contrastive_statistics,
    contrastive_statistics_reference,
    positive_weight,
)
from florence_fast.ops.contrastive_loss import triton as contrastive_loss_triton
from tests.ops.rounding import assert_as_exact, relative_error

# A kernel's loss is a mean of differences of logits: their rounding, not the loss's own, is what it cannot go below.
ROUNDING = 2e-6

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One batch: texts are their images plus ``noise``; ``names`` distinct labels, or CLIP's diagonal."""

    batch: int
    dim: int
    names: int | None = None
    scale: float = 20.0
    noise: float = 3.0
    chunk_size: int | None = None

    def make(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        images = torch.randn(self.batch, self.dim)
        texts = images + self.noise * torch.randn(self.batch, self.dim)
        tensors = {
            "image_features": F.normalize(images, dim=1).to(dtype),
            "text_features": F.normalize(texts, dim=1).to(dtype),
            "logit_scale": torch.tensor(self.scale),
        }
        labels = None if self.names is None else torch.randint(self.names, (self.batch,), device=device) - 5 << 40
        tensors = {name: x.to(device).requires_grad_() for name, x in tensors.items()}
        return tensors, {"labels": labels, "chunk_size": self.chunk_size}


CASES = {
    "clip-ragged": Case(100, 40),
    "clip-whole-blocks": Case(256, 32),
    "unicl": Case(300, 32, names=40),
    "unicl-in-chunks": Case(200, 48, names=30, chunk_size=70),
    "one-name": Case(70, 16, names=1),
    "sharp": Case(130, 72, scale=100.0),
    "depth-17": Case(90, 17, names=20),
}


def wide(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, labels: Tensor | None = None, **_: Any
) -> Tensor:
    """Compute the loss with all its logits in the dtype of the features, as one would write it in PyTorch."""
    logits = logit_scale.to(image_features.dtype) * image_features @ text_features.T
    same = torch.eye(len(logits)).bool().to(logits.device) if labels is None else labels[:, None] == labels
    target = same / same.sum(1, keepdim=True)
    rows, columns = (-(target.to(x.dtype) * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T))
    return (rows + columns) / 2


def run(function: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    out = function(**tensors, **options)
    grads = torch.autograd.grad(out, list(tensors.values()))
    return {"loss": out.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.contrastive_loss(**kwargs)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors, options = case.make(dtype, device)
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = run(ops.contrastive_loss_reference, exact_tensors, options)
    compare(run(kernels, tensors, options), run(wide, tensors, options), exact, case.scale, f"{dtype}, {case}")


def compare(ours: Tensors, usual: Tensors, exact: Tensors, scale: float, what: str) -> None:
    """Hold our error against plain PyTorch's: twice as much in the loss, thrice in gradients."""
    for name, x in exact.items():
        error, factor = relative_error(ours[name], x), 2 if name == "loss" else 3
        allowed = max(factor * relative_error(usual[name], x), ROUNDING * scale / 20)
        assert error <= allowed, f"{name}, {what}: {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")
    check(case, dtype, device)


@pytest.mark.parametrize("name", ["unicl", "clip-ragged"])
def test_the_tiles_of_hopper(name: str) -> None:
    with assume(H200):
        check(CASES[name], torch.float16, "cpu")


def test_a_loss_near_zero_keeps_its_digits(device: str) -> None:
    tensors, options = Case(90, 32, scale=30.0, noise=0.5).make(torch.float32, device)
    exact_tensors = {name: x.detach().double() for name, x in tensors.items()}
    exact = ops.contrastive_loss_reference(**exact_tensors, **options)
    assert 1e-6 < exact < 1e-3, f"the pairs are too hard or too easy: {exact:.1e}"
    error, allowed = (abs(x - exact) for x in (kernels(**tensors, **options), wide(**tensors)))
    assert error <= 2 * allowed + 2e-8, f"error {error:.1e}, plain PyTorch's {allowed:.1e} of {exact:.1e}"


def test_one_direction_of_unequal_numbers(device: str) -> None:
    tensors, _ = Case(150, 24).make(torch.float32, device)
    tensors["image_features"] = tensors["image_features"].detach()[:70].requires_grad_()
    text_labels = torch.randint(30, (150,), device=device)
    options = {"labels": text_labels[-70:], "text_labels": text_labels, "reduction": "image_to_text"}
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = run(ops.contrastive_loss_reference, exact_tensors, options)
    usual = run(ops.contrastive_loss_reference, tensors, options)
    for name, x in run(kernels, tensors, options).items():
        assert_as_exact(x, usual[name], exact[name], name)


@given(batch=st.integers(1, 150), dim=st.integers(1, 70), names=st.none() | st.integers(1, 60))
def test_any_size(batch: int, dim: int, names: int | None) -> None:
    tensors, options = Case(batch, dim, names).make(torch.float32, "cpu")
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact, ours = run(ops.contrastive_loss_reference, exact_tensors, options), run(kernels, tensors, options)
    for name, x in exact.items():
        torch.testing.assert_close(ours[name].double(), x, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_far_apart_take_the_form_with_two_exponentials(device: str) -> None:
    tensors, options = Case(80, 24, names=20, scale=300.0).make(torch.float32, device)
    with torch.no_grad():
        tensors["image_features"][::3] *= 0.05
    exact_tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact = run(ops.contrastive_loss_reference, exact_tensors, options)
    lse = (300 * exact_tensors["image_features"] @ exact_tensors["text_features"].T).logsumexp(1) / math.log(2)
    assert lse.max() - lse.min() > 100
    usual = run(ops.contrastive_loss_reference, tensors, options)
    compare(run(kernels, tensors, options), usual, exact, 300, "far apart")


def test_column_statistics_in_a_small_scratch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = Case(300, 32, names=40).make(torch.float32, device)
    expected = run(kernels, tensors, options)
    monkeypatch.setattr(contrastive_loss_triton, "SCRATCH_BYTES", 8 * 300)
    for name, x in run(kernels, tensors, options).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("num_rows", "num_cols"), [(70, 150), (150, 90), (0, 40)], ids=str)
def test_statistics_of_some_rows_against_all_columns(num_rows: int, num_cols: int, device: str) -> None:
    rows, cols = torch.randn(num_rows, 24, device=device), torch.randn(num_cols, 24, device=device)
    col_labels = torch.randint(10, (num_cols,), device=device)
    row_labels = col_labels[torch.randint(num_cols, (num_rows,), device=device)]
    scale = torch.tensor(2.0, device=device)
    inputs = [x.requires_grad_() for x in (rows, cols, scale)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    weight = positive_weight(row_labels, col_labels, torch.float32)
    exact = contrastive_statistics_reference(*exact_inputs, row_labels, col_labels, weight.double())
    usual = contrastive_statistics_reference(*inputs, row_labels, col_labels, weight)
    with ops.backend("triton"):
        ours = contrastive_statistics(*inputs, row_labels, col_labels, weight)
    weights = [torch.randn_like(x) for x in ours]
    for name, *found in zip(ours._fields, ours, usual, exact, strict=True):
        assert_as_exact(*found, name)
    used = [k for k, x in enumerate(ours) if x.requires_grad and x.numel() and x.isfinite().all()]
    if not used:
        return
    sums = [sum((x[k] * weights[k].to(x[k].dtype)).sum() for k in used) for x in (ours, usual, exact)]
    grads = [torch.autograd.grad(x, y) for x, y in zip(sums, (inputs, inputs, exact_inputs), strict=True)]
    *features, scales = zip(*grads, strict=True)
    for name, found in zip(("drows", "dcols"), features, strict=True):
        assert_as_exact(*found, name, factor=3)
    # dscale = <drows, rows> / scale is a sum whose terms cancel: each of them is rounded, whatever is left of the sum.
    terms = exact_inputs[0].norm() * features[0][-1].norm() / scale
    assert abs(scales[0] - scales[-1]) <= 4 * torch.finfo(torch.float32).eps * terms


def test_every_subset_of_gradients(device: str) -> None:
    tensors, options = CASES["unicl-in-chunks"].make(torch.float32, device)
    everything = run(kernels, tensors, options)
    for count in (1, 2):
        for subset in itertools.combinations(tensors, count):
            some = {name: x.detach().requires_grad_(name in subset) for name, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some, **options), [some[name] for name in subset])
            for name, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{name}"]), f"d{name} when only {subset} are asked for"


def test_bit_equal_over_runs_and_for_any_strides(device: str) -> None:
    tensors, options = CASES["unicl"].make(torch.float16, device)
    expected = run(kernels, tensors, options)
    turned = {name: x.detach().T.contiguous().T.requires_grad_() if x.ndim == 2 else x for name, x in tensors.items()}
    for inputs in (tensors, turned):
        assert all(torch.equal(x, expected[name]) for name, x in run(kernels, inputs, options).items())


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_nan_is_not_lost(device: str) -> None:
    tensors, options = CASES["clip-ragged"].make(torch.float32, device)
    with torch.no_grad():
        tensors["text_features"][3, 2] = math.nan
    assert all(x.isnan().all() for x in run(kernels, tensors, options).values())


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool, device: str) -> None:
    tensors, _ = replace(CASES["unicl-in-chunks"], batch=40).make(torch.float32, device)
    labels = torch.randint(9, (40,), device=device)
    inputs = [x.detach().requires_grad_(train) for x in tensors.values()]
    arguments = (*inputs, labels, labels, positive_weight(labels, labels, torch.float32), 20, "triton")
    torch.library.opcheck(torch.ops.florence_fast.contrastive_loss.default, arguments)


def test_compiles_in_full(device: str) -> None:
    tensors, options = CASES["unicl"].make(torch.float32, device)
    with ops.backend("triton"):
        compiled = torch.compile(
            lambda **x: ops.contrastive_loss(**x, **options),
            fullgraph=True,
            backend="inductor" if device == "cuda" else "aot_eager",
        )
        got = run(compiled, tensors, {})
    assert all(torch.equal(x, got[name]) for name, x in run(kernels, tensors, options).items())


def test_float64_is_refused_with_the_reason() -> None:
    tensors, options = CASES["clip-ragged"].make(torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="features must be float16, bfloat16 or float32"):
        kernels(**tensors, **options)
