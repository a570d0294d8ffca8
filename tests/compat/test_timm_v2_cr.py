"""`accelerate` on timm's swin_transformer_v2_cr: the same numbers, the network of its biases, and timm's own ways."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

from florence_fast.compat.accelerate import accelerate, restore, timm_v2_cr
from tests.compat import third_party
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

timm = third_party.timm()
calls = third_party.calls

OLD = timm.__version__.startswith("0.")
not_in_old = pytest.mark.skipif(OLD, reason="before 1.0 timm's Swin takes only maps that windows and merges divide")

# maps and windows of 4: 18x23 and 9x12, ragged; 8x8 and 4x4, where the last stage is one window
RAGGED, EXACT = ((64, 96) if OLD else (72, 92)), (32, 32)
NAME = "swinv2_cr_tiny_224"


def build(name=NAME, size=EXACT, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0}
    return randomize(timm.create_model(name, img_size=size, num_classes=5, **{**sizes, **changes}).eval())


def pair(*args, **kwargs):
    ours, theirs = build(*args, **kwargs), build(*args, **kwargs)
    accelerate(ours, verbose=False)
    return ours, theirs


def run_seeded(model, *inputs):
    torch.manual_seed(3)
    return run(model, *inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [RAGGED, EXACT], ids=["ragged", "exact"])
def test_same_output_and_gradients(size, training, calls):
    ours, theirs = (model.train(training) for model in pair(size=size, extra_norm_stage=True))
    image = torch.randn(2, 3, *size)
    found, expected = run_seeded(ours, image), run_seeded(theirs, image)
    assert_equal_to_rounding(found, expected)
    assert {name for name in expected if "meta_mlp" in name or "logit_scale" in name}
    assert calls.count("window_attention") == calls.count("mlp") == 4
    assert calls.count("patch_merging") == 1
    assert calls.count("layer_norm") == 10, "two a block, and one at the end of each stage"


@pytest.mark.parametrize("name", timm.list_models("swinv2_cr*"))
def test_every_model_of_the_family(name, calls):
    draw = random.Random(name)
    heads = (draw.choice((1, 2, 3)), draw.choice((1, 2, 4)))
    width = heads[0] * heads[1] * draw.choice((8, 10, 14))
    ours, theirs = pair(name, (32, 48), embed_dim=width, depths=(1, 6), num_heads=heads, window_size=2)
    image = torch.randn(1, 3, 32, 48)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    ends = sum(isinstance(block.norm3, nn.LayerNorm) for stage in ours.stages for block in stage.blocks)
    assert ends == (2 if "_ns_" in name else 1)
    assert {op: calls.count(op) for op in set(calls)} == {
        "window_attention": 7,
        "mlp": 7,
        "layer_norm": 14 + ends,
        "patch_merging": 1,
    }


def test_biases_are_a_table_in_eval_and_those_of_every_pair_while_hidden_units_are_dropped():
    attn = build(window_size=4).stages[0].blocks[0].attn
    expected = attn._relative_positional_encodings()[0]
    table, pairs = timm_v2_cr._position_bias(attn)
    assert pairs is None and table.shape == (7 * 7, 1)
    place = [(row, column) for row in range(4) for column in range(4)]
    for i, (row, column) in enumerate(place):
        for j, (other_row, other_column) in enumerate(place):
            offset = 7 * (row - other_row + 3) + column - other_column + 3
            torch.testing.assert_close(table[offset], expected[:, i, j])
    table, pairs = timm_v2_cr._position_bias(attn.train())
    assert table is None and pairs.shape == (1, 16, 16) and error(pairs, expected) > 1e-3


def test_the_temperature_is_limited_as_theirs():
    ours, theirs = pair(size=RAGGED)
    for model in (ours, theirs):
        for stage in model.stages:
            for block in stage.blocks:
                nn.init.constant_(block.attn.logit_scale, 5.0)
    image = torch.randn(2, 3, *RAGGED)
    found, expected = run(ours, image), run(theirs, image)
    assert error(found["output 0"], expected["output 0"]) <= 1e-5
    assert not found["stages.0.blocks.0.attn.logit_scale"].any()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_as_good_in_bf16(autocast):
    ours, theirs = pair(size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    exact = run(copy.deepcopy(theirs).double(), image.double())
    if not autocast:
        ours, theirs, image = ours.bfloat16(), theirs.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [run(model, image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, exact)


def test_drop_path_draws_the_same_numbers():
    ours, theirs = (model.train() for model in pair(drop_path_rate=0.5, extra_norm_stage=True))
    image = torch.randn(8, 3, *EXACT)
    assert_equal_to_rounding(run_seeded(ours, image), run_seeded(theirs, image))


@not_in_old
def test_dynamic_image_sizes(calls):
    ours, theirs = pair(strict_img_size=False)
    for size in (RAGGED, EXACT, (16, 16), (24, 60), (8, 12)):  # from the third on, maps smaller than the window
        image = torch.randn(2, 3, *size)
        assert error(ours(image), theirs(image)) <= 1e-5, size
    assert calls.count("window_attention") > 10


@not_in_old
@pytest.mark.parametrize("always", [False, True], ids=["shrinks", "always-partition"])
def test_set_input_size_after_accelerating(always):
    ours, theirs = pair(always_partition=always)
    for model in (ours, theirs):
        model.set_input_size(img_size=(72, 48), window_size=(6, 3))
    image = torch.randn(2, 3, 72, 48)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))


@not_in_old
def test_windows_follow_the_size_unless_they_are_given(calls):
    ours, theirs = pair(window_size=None, size=(64, 128))
    for model in (ours, theirs):
        model.set_input_size(img_size=(128, 192))
    image = torch.randn(1, 3, 128, 192)
    assert error(ours(image), theirs(image)) <= 1e-5
    assert ours.stages[0].blocks[0].window_size == (4, 6) and calls.count("window_attention") == 4


def test_features_only(calls):
    ours, theirs = pair(features_only=True, out_indices=(0, 1), size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == 4


@pytest.mark.parametrize("part", ["attention", "merging", "mlp", "norm"])
def test_parts_are_switched_off(part, calls):
    ours, theirs = build(), build()
    accelerate(ours, verbose=False, **{part: False})
    image = torch.randn(2, 3, *EXACT)
    assert error(ours(image), theirs(image)) <= 1e-5
    names = {"attention": "window_attention", "merging": "patch_merging", "mlp": "mlp", "norm": "layer_norm"}
    assert set(calls) == set(names.values()) - {names[part]}


def test_attention_dropout_runs_their_attention_and_our_mlp(calls):
    ours, theirs = (model.train() for model in pair(attn_drop_rate=0.3))
    image = torch.randn(2, 3, *EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal_to_rounding(run_seeded(ours, image), run_seeded(theirs, image))
    assert "window_attention" not in calls and "mlp" in calls
    ours.eval()(image)
    assert "window_attention" in calls


def test_hooks_and_adapters_put_in_later_are_obeyed(calls):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours, theirs = pair(size=RAGGED)
    image = torch.randn(2, 3, *RAGGED)
    plain = ours(image)
    calls.clear()
    for model in (ours, theirs):
        first, second = model.stages[0].blocks
        second.attn.qkv.__class__ = Twice
        first.attn.attn_drop.register_forward_hook(lambda module, args, out: out * 2)
        first.norm2.register_forward_hook(lambda module, args, out: out * 2)
        second.mlp.fc1.__class__ = Twice
        model.stages[1].downsample.norm.register_forward_hook(lambda module, args, out: out * 2)
        model.stages[1].blocks[0].attn.meta_mlp.fc1.register_forward_hook(lambda module, args, out: out * 2)
    assert error(ours(image), theirs(image)) <= 1e-5 < error(ours(image), plain)
    assert calls.count("window_attention") == calls.count("mlp") == 2 * 3
    assert "patch_merging" not in calls


@pytest.mark.parametrize("part", ["qkv", "proj", "attn_drop"])
def test_hooks_inside_the_attention_see_what_theirs_show(part, calls):
    ours, theirs = pair(size=RAGGED)
    image, seen = torch.randn(1, 3, *RAGGED), []
    for model in (ours, theirs):
        module = model.stages[0].blocks[1].attn.get_submodule(part)
        module.register_forward_hook(lambda module, args, out: seen.append(out))
        model(image)
    assert len(seen) == 2 and error(*seen) <= 1e-5
    assert calls.count("window_attention") == 3


def test_an_attention_that_is_switched_off_may_be_anything(calls):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours, theirs = build(), build()
    for model in (ours, theirs):
        first, second = model.stages[0].blocks
        first.attn.register_forward_hook(lambda module, args, out: 2 * out)
        second.attn.qkv.__class__ = Twice
    assert not accelerate(ours, attention=False, verbose=False).skipped
    image = torch.randn(1, 3, *EXACT)
    assert error(ours(image), theirs(image)) <= 1e-5
    assert "window_attention" not in calls and calls.count("mlp") == 4


def test_gradient_checkpointing_changes_nothing(calls):
    ours = pair()[0].train()
    image = torch.randn(1, 3, *EXACT)
    expected = run_seeded(ours, image)
    ours.set_grad_checkpointing()
    found = run_seeded(ours, image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert calls.count("window_attention") > 8, "recomputed in the backward"


def test_compiles_into_one_graph(calls):
    ours, theirs = pair(size=RAGGED)
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


def hook_attention(block):
    block.attn.register_forward_hook(lambda *args: None)


def ask_for_sequential_attention(block):
    block.attn.sequential_attn = True


def replace_attention(block):
    block.attn = nn.Identity()


def replace_biases(block):
    block.attn._relative_positional_encodings = lambda: 0


def widen_windows(block):
    block.window_size = (4, 5)


REFUSALS = [
    (hook_attention, "its attention has hooks or another forward"),
    (ask_for_sequential_attention, "it was asked for sequential attention"),
    (replace_attention, "its attention is a Identity"),
    (replace_biases, "its _relative_positional_encodings is already replaced"),
    (widen_windows, r"the coordinates must have shape \(400, 2\), got \(256, 2\)"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[change.__name__ for change, _ in REFUSALS])
def test_a_block_that_is_not_as_it_should_be_is_left_alone(change, reason):
    block = build().stages[0].blocks[0]
    change(block)
    with pytest.raises(ValueError, match=reason):
        accelerate(block)


def test_the_report_names_every_layer_or_why_not():
    model = build()
    hook_attention(model.stages[0].blocks[0])
    model.stages[1].downsample.norm = nn.Identity()
    report = accelerate(model, verbose=False)
    names = ["stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
    assert report.swapped == {"timm SwinTransformerV2CrBlock": names}
    assert report.skipped["stages.1.downsample"] == (
        "merged tokens must be normalised by a plain nn.LayerNorm, got Identity"
    )
    assert len(report.skipped) == 2
