"""Swin V2 and Swin2SR of transformers, accelerated: the same numbers at every size, and what stays their own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate, pieces, restore
from tests.compat.hugging_face_models import assert_equal_to_rounding, error, run

transformers = pytest.importorskip("transformers")

# windows of 4 of maps made for 16x16 and 8x8: ragged 18x23 and 9x12; exact
RAGGED, EXACT = (70, 91), (64, 64)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "image_size": 64}
    model = transformers.Swinv2Model(transformers.Swinv2Config(**{**sizes, "drop_path_rate": 0.0, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def swin2sr():
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depths": (2,), "num_heads": (2,), "window_size": 4, "image_size": 16}
    model = transformers.Swin2SRModel(transformers.Swin2SRConfig(**sizes, num_channels=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def layers(model):
    return [m for m in model.modules() if type(m).__name__ in ("Swinv2Layer", "Swin2SRLayer")]


@pytest.fixture
def calls(monkeypatch):
    """The shift of every call of window attention."""
    seen = []
    original = ops.window_attention

    def counting(*args, **kwargs):
        seen.append(kwargs["shift_size"])
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "window_attention", counting)
    return seen


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", [RAGGED, EXACT], ids=["ragged", "exact"])
def test_outputs_and_gradients_in_float64(size, bias, calls):
    model = build(qkv_bias=bias).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = run(model, image)
    report = accelerate(model, verbose=False)
    assert_equal_to_rounding(run(model, image), expected, 1e-10)
    assert calls == [0, 2, 0, 2]
    assert {kind: len(names) for kind, names in report.swapped.items()} == {
        "transformers Swinv2Layer": 4,
        "transformers Swinv2PatchMerging": 1,
    }


def test_outputs_and_gradients_in_float32(calls):
    exact = build().double()
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    truth = run(exact, image)
    theirs = copy.deepcopy(exact).float()
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    expected, found = run(theirs, image.float()), run(ours, image.float())
    assert error(found["output"], expected["output"]) <= 1e-5
    for name in truth:
        assert error(found[name], truth[name]) <= 2 * error(expected[name], truth[name]) + 1e-5, name


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bfloat16_is_no_worse_than_theirs(autocast, calls):
    exact = build(embed_dim=32).double()
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    truth = run(exact, image)
    theirs = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    image = image.to(theirs.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = run(theirs, image), run(ours, image)
    assert len(calls) == 4
    assert error(found["output"], truth["output"]) <= 2 * error(expected["output"], truth["output"])
    ours_in_all, theirs_in_all = (sum(error(x[n], truth[n]) for n in truth) for x in (found, expected))
    assert ours_in_all <= 1.2 * theirs_in_all, f"sum of errors {ours_in_all:.3f} against {theirs_in_all:.3f}"


@pytest.mark.parametrize("side", [8, 16, 24], ids=lambda side: f"{side}px")
def test_maps_no_larger_than_the_window_are_padded_and_shifted_by_theirs(side, calls):
    model = build(seed=1).double()  # maps 2, 4 and 6 high in windows of 4, shifted as for 64 pixels
    image = torch.randn(1, 3, side, 40, dtype=torch.float64)
    expected = run(model, image)
    accelerate(model, verbose=False)
    assert_equal_to_rounding(run(model, image), expected, 1e-10)
    assert calls == {8: [], 16: [0], 24: [0, 2]}[side]


def test_attention_weights_and_dropout_come_from_their_own_forward(calls):
    pieces.warn_of_dropout.cache_clear()
    model = build(attention_probs_dropout_prob=0.25)
    image = torch.randn(1, 3, *EXACT)
    expected = model(image, output_attentions=True)
    accelerate(model, verbose=False)
    found = model(image, output_attentions=True)
    assert all(error(f, e) <= 1e-5 for f, e in zip(found.attentions, expected.attentions, strict=True))
    with pytest.warns(UserWarning, match=r"attention_probs_dropout_prob=0\.25"):
        model.train()(image)
    assert not calls
    model.eval()(image)
    assert len(calls) == 4


def test_drop_path_makes_the_same_draws(calls):
    theirs = build(drop_path_rate=0.5).train()
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    image = torch.randn(4, 3, *RAGGED)
    torch.manual_seed(7)
    expected = theirs(image).last_hidden_state
    torch.manual_seed(7)
    assert error(ours(image).last_hidden_state, expected) <= 1e-5
    assert len(calls) == 4


@pytest.mark.parametrize("size", [(20, 28), (16, 16)], ids=["larger", "as-built"])
def test_swin2sr(size, calls):
    model = swin2sr().double()
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    expected = run(model, image)
    assert accelerate(model, verbose=False).swapped == {
        "transformers Swin2SRLayer": ["encoder.stages.0.layers.0", "encoder.stages.0.layers.1"]
    }
    assert_equal_to_rounding(run(model, image), expected, 1e-10)
    assert calls == [0, 2]


def test_compiles_copies_pickles_and_goes_back(calls):
    model = build(depths=(2, 1))
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    keys = list(model.state_dict())
    accelerate(model, verbose=False)
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert error(copied(image).last_hidden_state, expected) <= 1e-5 and len(calls) == 3
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert error(compiled(image).last_hidden_state, expected) <= 1e-5
    assert len(restore(model)) == 4
    assert torch.equal(model(image).last_hidden_state, expected)


def test_gradient_checkpointing_changes_nothing(calls):
    model = build().train()
    accelerate(model, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    expected = run(model, image)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def hook_key(layer):
    layer.attention.self.key.register_forward_hook(lambda *_: None)


def wrap_value(layer):
    layer.attention.self.value = nn.Sequential(layer.attention.self.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hook_key, "its attention has hooks"), (wrap_value, "q, k and v must come from plain nn.Linear, got Sequential")],
    ids=["hook", "wrapped"],
)
def test_what_hangs_on_the_attention_is_not_passed_over(change, reason, calls):
    model, image = build(), torch.randn(1, 3, *EXACT)
    accelerate(model, verbose=False)
    expected = model(image).last_hidden_state
    change(layers(model)[1])
    calls.clear()
    assert error(model(image).last_hidden_state, expected) <= 1e-5 and len(calls) == 3
    restore(model)
    assert reason in accelerate(model, verbose=False).skipped["encoder.layers.0.blocks.1"]
