"""What `accelerate` computes by our ops in Hugging Face's Swin beside attention, by each option, and what it calls."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate, restore
from florence_fast.compat.accelerate.options import Options
from tests.compat.hugging_face_models import (
    EXACT,
    RAGGED,
    assert_equal_to_rounding,
    blocks,
    build,
    error,
    owner_and_name,
    run,
)

transformers = pytest.importorskip("transformers")

OPS = ("window_attention", "layer_norm", "mlp", "patch_merging", "linear")
ALL = {"window_attention": 4, "layer_norm": 8, "mlp": 4, "patch_merging": 1, "linear": 8}


@pytest.fixture
def calls(monkeypatch):
    """How often each op was called."""
    seen = Counter()

    def counting(name):
        original = getattr(ops, name)

        def op(*args, **kwargs):
            seen[name] += 1
            return original(*args, **kwargs)

        return op

    for name in OPS:
        monkeypatch.setattr(ops, name, counting(name))
    return seen


OPTIONS = [
    ({}, ALL),
    ({"mlp": False}, {**ALL, "mlp": 0}),
    ({"norm": False}, {**ALL, "layer_norm": 0}),
    ({"merging": False}, {**ALL, "patch_merging": 0}),
    ({"attention": False}, {"layer_norm": 8, "mlp": 4, "patch_merging": 1}),
]


@pytest.mark.parametrize(("options", "expected_calls"), OPTIONS, ids=lambda value: "-".join(value) or "all")
def test_each_option_leaves_its_part_to_the_model(options, expected_calls, calls):
    model = build().double()
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    expected = run(model, image)
    report = accelerate(model, **options, verbose=False)
    assert_equal_to_rounding(run(model, image), expected, 1e-10)
    assert +calls == +Counter(expected_calls)
    assert len(report.swapped["transformers SwinLayer"]) == 4
    merges = 0 if options == {"merging": False} else 1
    assert len(report.swapped.get("transformers SwinPatchMerging", [])) == merges
    assert report.skipped == ({} if merges else {"encoder.layers.0.downsample": "left as it is by merging=False"})


def test_every_option_switched_off_is_nothing_to_do():
    nothing = "4 x left as it is by attention=False, mlp=False, norm=False; 1 x left as it is by merging=False"
    with pytest.raises(ValueError, match=nothing):
        accelerate(build(), attention=False, merging=False, mlp=False, norm=False)
    with pytest.raises(TypeError, match="positional"):
        accelerate(build(), False)


def test_options_are_kept_until_restore(calls):
    model = build()
    accelerate(model, mlp=False, verbose=False)
    assert not accelerate(model, verbose=False).swapped
    assert blocks(copy.deepcopy(model))[0].forward.keywords == {"options": Options(mlp=False)}
    assert len(restore(model)) == 5
    accelerate(model, verbose=False)
    model(torch.randn(1, 3, *EXACT))
    assert calls == ALL


@pytest.mark.parametrize("size", [RAGGED, (33, 51), EXACT], ids=["18x23", "9x13", "8x8"])
def test_a_merge_alone(size, calls):
    merge = build().double().encoder.layers[0].downsample
    height, width = (-(-side // 4) for side in size)
    x = torch.randn(2, height * width, 24, dtype=torch.float64, requires_grad=True)

    def gradients():
        out = merge(x, (height, width))
        return [out, *torch.autograd.grad(out.sin().sum(), [x, *merge.parameters()])]

    expected = gradients()
    assert accelerate(merge, verbose=False).swapped == {"transformers SwinPatchMerging": [""]}
    assert max(error(f, e) for f, e in zip(gradients(), expected, strict=True)) <= 1e-12
    assert calls == {"patch_merging": 1}


ACTIVATIONS = [("gelu", 4), ("gelu_pytorch_tanh", 4), ("quick_gelu", 4), ("gelu_python", 0), ("relu", 0)]


@pytest.mark.parametrize(("name", "fused"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_activations_without_an_op_are_called(name, fused, calls):
    model = build(hidden_act=name)
    image = torch.randn(1, 3, *EXACT)
    expected = model(image).last_hidden_state
    accelerate(model, verbose=False)
    assert error(model(image).last_hidden_state, expected) <= 1e-5
    assert calls["mlp"] == fused


def doubled(output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


class Doubled(nn.Module):
    """Stands for an adapter: it owns what it replaces and computes something else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        """Show the parts of what is wrapped, as adapters do."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return doubled(self.inner(*args, **kwargs))


def double(owner, name):
    setattr(owner, name, Doubled(getattr(owner, name)))


def hook(owner, name):
    getattr(owner, name).register_forward_hook(lambda module, args, output: doubled(output))


def patch(owner, name):
    own = getattr(owner, name).forward
    getattr(owner, name).forward = lambda *args, **kwargs: doubled(own(*args, **kwargs))


def parametrize(owner, name):
    module = getattr(owner, name)
    weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)


LAYER_PARTS = [
    ("layernorm_before", {"layer_norm": 7}),
    ("layernorm_after", {"layer_norm": 7}),
    ("mlp", {"mlp": 3}),
    ("mlp.fc1", {"mlp": 3}),
    ("mlp.activation_fn", {"mlp": 3}),
    ("mlp.fc2", {"mlp": 3}),
    ("attention.o_proj", {"linear": 7}),
    ("attention", {"window_attention": 3, "layer_norm": 6, "mlp": 3, "linear": 6}),
]


@pytest.mark.parametrize(("part", "fewer"), LAYER_PARTS, ids=[part for part, _ in LAYER_PARTS])
@pytest.mark.parametrize("change", [double, hook, patch], ids=["replaced", "hooked", "another-forward"])
def test_what_hangs_on_a_part_of_a_layer_is_not_passed_over(change, part, fewer, calls):
    ours, theirs = build(), build()
    accelerate(ours, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    plain = ours(image).last_hidden_state
    for model in (ours, theirs):
        change(*owner_and_name(blocks(model)[1], part))
    calls.clear()
    found = ours(image).last_hidden_state
    assert error(found, theirs(image).last_hidden_state) <= 1e-5 and error(found, plain) > 1e-3
    assert calls == {**ALL, **fewer}


@pytest.mark.parametrize("change", [double, hook, patch, parametrize], ids=lambda change: change.__name__)
@pytest.mark.parametrize("part", ["norm", "reduction"])
def test_what_hangs_on_a_merge_is_not_passed_over(change, part, calls):
    if change is parametrize and part == "norm":
        pytest.skip("weight normalisation is for products")
    ours, theirs = build(), build()
    accelerate(ours, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    for model in (ours, theirs):
        change(model.encoder.layers[0].downsample, part)
    assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    assert calls["patch_merging"] == 0


def test_a_parametrised_product_is_called(calls):
    ours, theirs = build(), build()
    accelerate(ours, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    for model in (ours, theirs):
        parametrize(*owner_and_name(blocks(model)[1], "mlp.fc2"))
    assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    assert calls["mlp"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_drop_path_makes_the_same_draws(dtype, calls):
    exact = build(drop_path_rate=0.5).train()
    theirs, image = copy.deepcopy(exact).to(dtype), torch.randn(4, 3, *RAGGED)
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    found, expected = [], []
    for model, out in ((theirs, expected), (ours, found)):
        torch.manual_seed(3)
        out.extend(model(image.to(dtype)).last_hidden_state for _ in range(2))
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert all(error(f, e) <= bound for f, e in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1]), "another draw each time"
    assert calls["layer_norm"] == 16
