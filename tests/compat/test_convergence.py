"""Sixty steps of training with and without `accelerate`, from the same weights: the same losses.

What the bounds stand on. Training multiplies rounding: where a ReLU's input is near zero or a gradient near the epsilon
of AdamW, a difference in the last bit becomes a step of another size. Swin V2 has such places by construction: the
biases of the network that makes its position biases begin at zero, the kink itself. Hence

- in float64, where rounding stays below any bound, every recipe must give the same losses;
- in float32 the recipe must be one that the model itself repeats when its batches are reversed, which changes
  nothing but the order of sums; that is asked first;
- in bfloat16 a curve is held to 1e-3 where the model repeats itself so well, and elsewhere to twice the distance from
  float32 of the unaccelerated model's. The head is in float32: a bfloat16 between 1 and 2 is known to 1/128, and with
  logits of that kind a loss of few images shows little else.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate

transformers = pytest.importorskip("transformers")

STEPS = 60
NANO = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "image_size": 32, "num_labels": 4}


@pytest.fixture
def calls(monkeypatch):
    """How often each op was called."""
    seen = Counter()

    def counting(name, original):
        def op(*args, **kwargs):
            seen[name] += 1
            return original(*args, **kwargs)

        return op

    for name in ("window_attention", "mlp"):
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return seen


def build(version, **changes):
    torch.manual_seed(0)
    sizes = {**NANO, "drop_path_rate": 0.0, **changes}
    if version == "v1":
        return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes))
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**sizes))


def losses(model, *, accelerated=False, images=16, size=(28, 36), autocast=False, head=torch.float32, reverse=False):
    """Train a copy on two batches in turn, whose maps the windows do not divide, and return the loss of each step."""
    model = copy.deepcopy(model).train()
    if accelerated:
        accelerate(model, verbose=False)
    tower, dtype = getattr(model, model.base_model_prefix), model.dtype
    torch.manual_seed(1)
    pixels, labels = torch.randn(images, 3, *size).to(dtype), torch.arange(images) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    curve = []
    for step in range(STEPS):
        half = torch.arange(step % 2, images, 2)
        half = half.flip(0) if reverse else half
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = tower(pixels[half]).pooler_output
        with torch.autocast("cpu", head, enabled=head == torch.bfloat16):
            logits = model.classifier(features if head == torch.bfloat16 else features.to(dtype))
        loss = F.cross_entropy(logits.to(dtype), labels[half])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert sum(curve[-4:]) < 0.6 * sum(curve[:4]), "it learns"
    return torch.tensor(curve, dtype=torch.float64)


def apart(found, expected):
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_float64(version, calls):
    model = build(version, drop_path_rate=0.1).double()
    expected = losses(model)
    assert not calls
    assert apart(losses(model, accelerated=True), expected) <= 1e-9
    assert calls == {"window_attention": 3 * STEPS, "mlp": 3 * STEPS}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_float32(version, calls):
    model = build(version)
    expected = losses(model, images=8)
    repeated = apart(losses(model, images=8, reverse=True), expected)
    assert repeated <= 1e-6, f"the model itself does not repeat this recipe: {repeated:.1e}"
    assert not calls
    assert apart(losses(model, images=8, accelerated=True), expected) <= 1e-6
    assert calls == {"window_attention": 3 * STEPS, "mlp": 3 * STEPS}


def test_swin_in_bfloat16(calls):
    model = build("v1", drop_path_rate=0.1)
    expected = losses(model, autocast=True)
    assert not calls
    assert apart(losses(model, autocast=True, accelerated=True), expected) <= 1e-3
    assert calls == {"window_attention": 3 * STEPS, "mlp": 3 * STEPS}


@pytest.mark.parametrize(
    ("version", "head"), [("v1", torch.bfloat16), ("v2", torch.float32)], ids=["logits-too", "swin-v2"]
)
def test_no_further_from_float32_than_the_models_own_bfloat16(version, head, calls):
    model = build(version)
    exact = losses(model)
    theirs = apart(losses(model, autocast=True, head=head), exact)
    assert not calls
    ours = apart(losses(model, autocast=True, head=head, accelerated=True), exact)
    assert ours <= 2 * theirs, f"{ours:.1e} against {theirs:.1e}"
    assert calls == {"window_attention": 3 * STEPS, "mlp": 3 * STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_four_stages_in_float64(version, calls):
    changes = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 3, "image_size": 96}
    model = build(version, **changes, drop_path_rate=0.2).double()
    expected = losses(model, images=8, size=(92, 100))
    assert not calls
    assert apart(losses(model, images=8, size=(92, 100), accelerated=True), expected) <= 1e-9
    assert calls["window_attention"] == 5 * STEPS
