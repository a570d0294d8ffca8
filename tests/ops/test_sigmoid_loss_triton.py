"""The Triton kernels of the sigmoid loss against the float64 definition, through the interpreter on a CPU and on a GPU
where there is one.

Letters: B images · N texts · D embedding dim.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from florence_fast import ops
from florence_fast.kernels.targets import H200, assume
from tests.ops.rounding import relative_error


@dataclass(frozen=True)
class Case:
    """Texts are the first images plus noise; ``names`` distinct labels, or each image's own text."""

    images: int
    texts: int
    dim: int
    names: int | None = None
    scale: float = 10.0
    bias: float = -6.0
    chunk_size: int | None = None

    def make(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        everything = torch.randn(max(self.images, self.texts), self.dim)
        texts = everything[: self.texts] + torch.randn(self.texts, self.dim)
        tensors = {
            "image_features": F.normalize(everything[: self.images], dim=1).to(dtype),
            "text_features": F.normalize(texts, dim=1).to(dtype),
            "logit_scale": torch.tensor(self.scale),
            "logit_bias": torch.tensor(self.bias),
        }
        options = {"chunk_size": self.chunk_size}
        if self.names is not None:
            for name, count in (("labels", self.images), ("text_labels", self.texts)):
                options[name] = torch.randint(self.names, (count,), device=device) - 5 << 40
        return {name: x.to(device).requires_grad_() for name, x in tensors.items()}, options


CASES = {
    "ragged": Case(100, 100, 40),
    "whole-blocks": Case(256, 256, 32),
    "labels-in-chunks": Case(200, 200, 48, names=30, chunk_size=70),
    "more-texts": Case(70, 190, 17),
    "fewer-texts": Case(150, 40, 24, names=9),
    "far": Case(90, 90, 32, scale=80.0, bias=20.0),
    "as-siglip-begins": Case(120, 120, 32, bias=-10.0),
}


def wide(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute the loss with all its logits in the dtype of the features, as one would write it in PyTorch."""
    dtype = image_features.dtype
    logits = logit_scale.to(dtype) * image_features @ text_features.T + logit_bias.to(dtype)
    same = torch.eye(*logits.shape, device=logits.device).bool() if labels is None else labels[:, None] == text_labels
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()


def run(function: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    out = function(**tensors, **options)
    grads = torch.autograd.grad(out, list(tensors.values()))
    return {"loss": out.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def kernels(**kwargs: Any) -> Tensor:
    with ops.backend("triton"):
        return ops.sigmoid_loss(**kwargs)


def definition(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    return run(ops.sigmoid_loss_reference, exact, options)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors, options = case.make(dtype, device)
    exact, ours, usual = definition(tensors, options), run(kernels, tensors, options), run(wide, tensors, options)
    for name, x in exact.items():
        error, factor = relative_error(ours[name], x), 2 if name == "loss" else 3
        # The interpreter cuts the gradient of each logit to 16 bits where a GPU rounds it: the errors have one sign.
        least = 5e-4 if dtype == torch.float16 and device == "cpu" and name != "loss" else 2e-6
        allowed = max(factor * relative_error(usual[name], x), least)
        assert error <= allowed, f"{name}, {dtype}, {case}: {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, device: str, poisoned_memory: None) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16, not their values")
    check(case, dtype, device)


def test_the_tiles_of_hopper() -> None:
    with assume(H200):
        check(CASES["labels-in-chunks"], torch.float16, "cpu")


@given(images=st.integers(1, 150), texts=st.integers(1, 150), dim=st.integers(1, 70), names=st.integers(1, 60))
def test_any_size(images: int, texts: int, dim: int, names: int) -> None:
    tensors, options = Case(images, texts, dim, names).make(torch.float32, "cpu")
    exact = definition(tensors, options)
    for name, x in run(kernels, tensors, options).items():
        torch.testing.assert_close(x.double(), exact[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_every_subset_of_gradients(device: str) -> None:
    tensors, options = CASES["labels-in-chunks"].make(torch.float32, device)
    everything = run(kernels, tensors, options)
    for count in (1, 2, 3):
        for subset in itertools.combinations(tensors, count):
            some = {name: x.detach().requires_grad_(name in subset) for name, x in tensors.items()}
            grads = torch.autograd.grad(kernels(**some, **options), [some[name] for name in subset])
            for name, grad in zip(subset, grads, strict=True):
                assert torch.equal(grad, everything[f"d{name}"]), f"d{name} when only {subset} are asked for"


def test_bit_equal_over_runs_and_for_any_strides(device: str) -> None:
    tensors, options = CASES["fewer-texts"].make(torch.float16, device)
    expected = run(kernels, tensors, options)
    turned = {name: x.detach().T.contiguous().T.requires_grad_() if x.ndim == 2 else x for name, x in tensors.items()}
    for inputs in (tensors, turned):
        assert all(torch.equal(x, expected[name]) for name, x in run(kernels, inputs, options).items())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_is_not_lost(device: str) -> None:
    tensors, options = CASES["ragged"].make(torch.float32, device)
    with torch.no_grad():
        tensors["text_features"][3, 2] = math.nan
    got = run(kernels, tensors, options)
    assert got["loss"].isnan() and got["dlogit_bias"].isnan() and got["dlogit_scale"].isnan()
    assert got["dimage_features"].isnan().all() and got["dtext_features"][3].isnan().all()


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train: bool, device: str) -> None:
    tensors, options = Case(40, 50, 24, names=9).make(torch.float32, device)
    inputs = [x.detach().requires_grad_(train) for x in tensors.values()]
    arguments = (*inputs, options["labels"], options["text_labels"], 20, "triton")
    torch.library.opcheck(torch.ops.florence_fast.sigmoid_loss.default, arguments)


def test_compiles_in_full(device: str) -> None:
    tensors, options = CASES["fewer-texts"].make(torch.float32, device)
    with ops.backend("triton"):
        compiled = torch.compile(
            lambda **x: ops.sigmoid_loss(**x, **options),
            fullgraph=True,
            backend="inductor" if device == "cuda" else "aot_eager",
        )
        got = run(compiled, tensors, {})
    assert all(torch.equal(x, got[name]) for name, x in run(kernels, tensors, options).items())


def test_float64_is_refused_with_the_reason() -> None:
    tensors, options = CASES["ragged"].make(torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="features must be float16, bfloat16 or float32"):
        kernels(**tensors, **options)
