"""`accelerate` on timm's Swin: the same numbers at every size, and timm's own ways of changing a model."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

timm = third_party.timm()
calls = third_party.calls

OLD = timm.__version__.startswith("0.")
not_in_old = pytest.mark.skipif(OLD, reason="before 1.0 timm's Swin takes only maps that windows and merges divide")

# maps and windows of 4: 18x23 and 9x12, ragged; 8x8 and 4x4, where the last stage is one window
RAGGED, EXACT = ((64, 96) if OLD else (72, 92)), (32, 32)
KINDS = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]


def build(kind=KINDS[0], size=EXACT, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0}
    return randomize(timm.create_model(kind, img_size=size, num_classes=5, **{**sizes, **changes}).eval())


def pair(*args, **kwargs):
    ours, theirs = build(*args, **kwargs), build(*args, **kwargs)
    accelerate(ours, verbose=False)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [RAGGED, EXACT], ids=["ragged", "exact"])
def test_same_output_and_gradients(kind, size, training, calls):
    ours, theirs = (model.train(training) for model in pair(kind, size))
    image = torch.randn(2, 3, *size)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == calls.count("mlp") == 4
    assert calls.count("patch_merging") == (kind == KINDS[0])
    assert calls.count("layer_norm") == (8 if kind == KINDS[0] else 9), "two a block, and that of a merge of V2"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(9, 14), (8, 6)], ids=["odd", "even"])
def test_a_merge_alone(kind, size, calls):
    if OLD and size[0] % 2:
        pytest.skip("timm takes odd maps from 1.0 on")
    ours, theirs = (build(kind).layers[1].downsample for _ in range(2))
    name = type(ours).__name__
    assert accelerate(ours, verbose=False).swapped == {f"timm {name}": [""]}
    x = torch.randn(2, *size, 24)
    assert_equal_to_rounding(run(ours, x), run(theirs, x))
    assert calls == ["patch_merging" if kind == KINDS[0] else "layer_norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_as_good_in_bf16(kind):
    ours, theirs = pair(kind, RAGGED)
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(2, 3, *RAGGED).bfloat16()
    found = [run(model.bfloat16(), image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, run(exact, image.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_as_good_under_autocast(kind):
    ours, theirs = pair(kind, RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    exact = run(theirs, image)
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, {name: value.double() for name, value in exact.items()})


def test_drop_path_draws_the_same_numbers():
    ours, theirs = (model.train() for model in pair(drop_path_rate=0.5))
    image = torch.randn(8, 3, *EXACT)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(run(model, image))
    assert_equal_to_rounding(*found)


@not_in_old
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_image_sizes(kind, calls):
    ours, theirs = pair(kind, strict_img_size=False)
    for size in (RAGGED, EXACT, (16, 16), (24, 60), (8, 12)):  # from the third on, maps smaller than the window
        image = torch.randn(2, 3, *size)
        assert error(ours(image), theirs(image)) <= 1e-5, size
    assert calls.count("window_attention") > 10


@not_in_old
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("always", [False, True], ids=["shrinks", "always-partition"])
def test_set_input_size_after_accelerating(kind, always):
    ours, theirs = pair(kind, always_partition=always)
    for model in (ours, theirs):
        model.set_input_size(img_size=(72, 48), window_size=(6, 3))
    image = torch.randn(2, 3, 72, 48)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))


@not_in_old
def test_rectangular_windows_from_the_start():
    ours, theirs = pair(window_size=(2, 5), size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))


def test_features_only(calls):
    ours, theirs = pair(features_only=True, out_indices=(0, 1), size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == 4


@not_in_old
def test_swin_s3_is_of_the_same_blocks(calls):
    window = (4, 8)
    ours, theirs = pair("swin_s3_tiny_224", RAGGED, window_size=window)
    image = torch.randn(2, 3, *RAGGED)
    assert error(ours(image), theirs(image)) <= 1e-5
    assert calls.count("window_attention") == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["attention", "merging", "mlp", "norm"])
def test_parts_are_switched_off(kind, part, calls):
    ours, theirs = build(kind), build(kind)
    accelerate(ours, verbose=False, **{part: False})
    image = torch.randn(2, 3, *EXACT)
    assert error(ours(image), theirs(image)) <= 1e-5
    merge = "patch_merging" if kind == KINDS[0] else "layer_norm"
    counts = Counter(window_attention=4, mlp=4, layer_norm=8) + Counter([merge])
    switched_off = {"attention": "window_attention", "merging": merge, "mlp": "mlp", "norm": "layer_norm"}[part]
    counts -= Counter({switched_off: {"merging": 1, "norm": 8}.get(part, 4)})
    assert Counter(calls) == counts


def test_attention_dropout_runs_their_attention_and_our_mlp(calls):
    ours, theirs = (model.train() for model in pair(attn_drop_rate=0.3))
    image = torch.randn(2, 3, *EXACT)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run(model, image))
    assert_equal_to_rounding(*found)
    assert "window_attention" not in calls and "mlp" in calls
    ours.eval()(image)
    assert "window_attention" in calls


def test_hooks_and_adapters_put_in_later_are_obeyed(calls):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours, theirs = pair(size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    for model in (ours, theirs):
        first, second = model.layers[0].blocks
        second.attn.qkv.__class__ = Twice
        first.attn.attn_drop.register_forward_hook(lambda module, args, out: out * 2)
        first.norm2.register_forward_hook(lambda module, args, out: out * 2)
        second.mlp.fc1.__class__ = Twice
    assert error(ours(image), theirs(image)) <= 1e-5
    assert calls.count("window_attention") == 3 and calls.count("mlp") == 3


def test_an_attention_that_is_switched_off_may_be_anything(calls):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours, theirs = build(), build()
    for model in (ours, theirs):
        first, second = model.layers[0].blocks
        first.attn.register_forward_hook(lambda module, args, out: 2 * out)
        second.attn.qkv.__class__ = Twice
    assert not accelerate(ours, attention=False, verbose=False).skipped
    image = torch.randn(1, 3, *EXACT)
    assert error(ours(image), theirs(image)) <= 1e-5
    assert "window_attention" not in calls and calls.count("mlp") == 4


def test_gradient_checkpointing_changes_nothing(calls):
    ours = pair()[0].train()
    image = torch.randn(2, 3, *EXACT)
    expected = run(ours, image)
    ours.set_grad_checkpointing()
    found = run(ours, image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert calls.count("window_attention") > 8, "recomputed in the backward"


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind, calls):
    ours, theirs = pair(kind, RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert error(compiled(image), theirs(image)) <= 1e-5
    compiled(image).sum().backward()
    assert ours.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_files_and_the_way_back(copied, tmp_path, calls):
    ours, theirs = pair()
    image = torch.randn(2, 3, *EXACT)
    expected = ours(image)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.save(ours.state_dict(), tmp_path / "model.pt")
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    twin = copied(ours)
    calls.clear()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(twin(image), expected) and "window_attention" in calls
    assert len(restore(twin)) == 5
    calls.clear()
    assert torch.equal(twin(image), theirs(image)) and not calls


def test_the_report_names_every_layer_or_why_not():
    model = build()
    model.layers[0].blocks[0].attn.register_forward_hook(lambda *args: None)
    model.layers[1].blocks[0].attn.forward = model.layers[1].blocks[0].attn.forward
    report = accelerate(model, verbose=False)
    assert report.swapped["timm SwinTransformerBlock"] == ["layers.0.blocks.1", "layers.1.blocks.1"]
    assert report.swapped["timm PatchMerging"] == ["layers.1.downsample"]
    assert all("hooks or another forward" in reason for reason in report.skipped.values())
    assert len(report.skipped) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_is_not_as_it_should_be_is_left_alone(kind):
    merge = build(kind).layers[1].downsample
    hook = merge.reduction.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="its norm or its reduction has hooks or another forward"):
        accelerate(merge)
    hook.remove()
    merge.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"must be normalised by a plain nn\.LayerNorm, got Identity"):
        accelerate(merge)


def test_a_subclass_with_other_attention_is_left_alone():
    block = build().layers[0].blocks[0]
    block.__class__ = type("Other", (type(block),), {"_attn": lambda self, x: x})
    with pytest.raises(ValueError, match="Other has a _attn of its own"):
        accelerate(block)


@pytest.mark.parametrize("part", ["qkv", "proj", "softmax", "attn_drop"])
def test_hooks_inside_the_attention_see_what_theirs_show(part, calls):
    ours, theirs = pair(size=RAGGED)
    image, seen = torch.randn(1, 3, *RAGGED), []
    for model in (ours, theirs):
        module = model.layers[0].blocks[1].attn.get_submodule(part)
        module.register_forward_hook(lambda module, args, out: seen.append(out))
        model(image)
    assert len(seen) == 2 and error(*seen) <= 1e-5
    assert calls.count("window_attention") == 3
