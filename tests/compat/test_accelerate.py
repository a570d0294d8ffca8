"""`accelerate` on Hugging Face's Swin: the same numbers, the same model around them, and the way back."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

from florence_fast import native, ops
from florence_fast.compat.accelerate import accelerate, pieces, restore
from florence_fast.models import Swin
from tests.compat.hugging_face_models import (
    EXACT,
    OLD_LAYOUT,
    RAGGED,
    assert_equal_to_rounding,
    blocks,
    build,
    error,
    not_in_old_layout,
    run,
)
from tests.models.tiny import SWIN

transformers = pytest.importorskip("transformers")


def swin_t():
    model = transformers.SwinModel(transformers.SwinConfig(drop_path_rate=0.0)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "table")):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def test_a_swin_t_accelerated_in_three_lines_gives_equal_outputs(capsys, calls):
    model = swin_t()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(image)
        report = accelerate(model, verbose=True)
        found = model(image)
    assert error(found.last_hidden_state, expected.last_hidden_state) <= 1e-5
    assert error(found.pooler_output, expected.pooler_output) <= 1e-5
    assert len(calls) == 12 == len(report.swapped["transformers SwinLayer"])
    assert {call["shift_size"] for call in calls} == {0, 3}
    assert str(report) in capsys.readouterr().out
    assert "12: encoder.layers.0.blocks.0" in str(report)


@pytest.mark.parametrize("size", [(200, 248), (224, 224)], ids=str)
def test_outputs_and_gradients_of_swin_t(size, calls):
    model = swin_t()
    image = torch.randn(1, 3, *size)
    expected = run(model, image)
    accelerate(model, verbose=False)
    assert_equal_to_rounding(run(model, image), expected)
    assert len(calls) == 12


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", [RAGGED, EXACT], ids=["ragged", "exact"])
def test_outputs_and_gradients_in_float64(size, bias, calls):
    model = build(qkv_bias=bias).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = run(model, image)
    accelerate(model, verbose=False)
    assert_equal_to_rounding(run(model, image), expected, 1e-10)
    assert len(calls) == 4


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bfloat16_is_no_worse_than_theirs(autocast, calls):
    exact = build(embed_dim=32, window_size=7).double()
    for name, parameter in exact.named_parameters():
        nn.init.normal_(parameter, std=0.1 if "norm" not in name else 1.0)
    image = torch.randn(2, 3, *RAGGED, dtype=torch.float64)
    truth = run(exact, image)
    theirs = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    image = image.to(theirs.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = run(theirs, image), run(ours, image)
    assert len(calls) == 4
    worse = {
        name: (error(found[name], truth[name]), error(expected[name], truth[name]))
        for name in truth
        if error(found[name], truth[name]) > 2 * error(expected[name], truth[name]) + 1e-2
    }
    assert not worse, f"name: (ours, theirs) {worse}"
    ours_in_all, theirs_in_all = (sum(error(x[n], truth[n]) for n in truth) for x in (found, expected))
    assert ours_in_all <= 1.1 * theirs_in_all, f"sum of errors {ours_in_all:.3f} against {theirs_in_all:.3f}"


def test_a_backbone_partitions_always(calls):
    # 8x8 and 4x4 in windows of 4: theirs shifts the one window of the last stage, in a forward of its own
    model = build(transformers.SwinBackbone, out_features=["stage1", "stage2"])
    for size, on_kernels in ((EXACT, 3), (RAGGED, 4), ((24, 64), 2)):
        image = torch.randn(2, 3, *size)
        expected = model(image).feature_maps
        accelerate(model, verbose=False)
        found = model(image).feature_maps
        assert len(calls) == on_kernels, size
        assert all(error(f, e) <= 1e-5 for f, e in zip(found, expected, strict=True))
        calls.clear()
        restore(model)


def test_a_map_of_one_window_ends_the_shift_as_in_theirs(calls):
    theirs = build()
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    for size in (EXACT, RAGGED):
        image = torch.randn(2, 3, *size)
        assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    assert [call["shift_size"] for call in calls] == [0, 2, 0, 0] * 2
    assert [b.shift_size for b in blocks(ours)] == [b.shift_size for b in blocks(theirs)] == [0, 2, 0, 0]


@pytest.mark.parametrize("size", [(8, 8), EXACT], ids=["it", "the-map-after-it"])
def test_a_map_smaller_than_the_window_fails_as_in_theirs_and_so_does_the_next(size):
    theirs = build()
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    messages = []
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="must match"):
            model(torch.randn(1, 3, 8, 8))
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(1, 3, *size))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_attention_weights_come_from_their_own_forward(calls):
    model = build(attn_implementation="eager")
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image, output_attentions=True, output_hidden_states=True)
    accelerate(model, verbose=False)
    pieces.warn_of_weights.cache_clear()
    with pytest.warns(UserWarning, match="output_attentions or head_mask was asked for") as warned:
        found = model(image, output_attentions=True, output_hidden_states=True)
    assert len([w for w in warned if "output_attentions" in str(w.message)]) == 1
    assert not calls
    assert len(found.attentions) == 2
    assert all(error(f, e) <= 1e-5 for f, e in zip(found.attentions, expected.attentions, strict=True))
    found = model(image, output_hidden_states=True)
    assert len(calls) == 4
    assert [error(f, e) <= 1e-5 for f, e in zip(found.hidden_states, expected.hidden_states, strict=True)] == [True] * 3


def test_dropout_of_attention_weights_trains_in_their_own_forward_with_one_warning(calls):
    pieces.warn_of_dropout.cache_clear()
    model = build(attention_probs_dropout_prob=0.25)
    accelerate(model, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    with pytest.warns(UserWarning, match=r"attention_probs_dropout_prob=0\.25") as warned:
        model.train()(image)
        model(image)
    assert len([w for w in warned if "attention_probs_dropout_prob" in str(w.message)]) == 1
    assert not calls
    model.eval()(image)
    assert len(calls) == 4


def test_drop_path_and_dropout_of_features_act_in_training(calls):
    theirs = build(drop_path_rate=0.5, hidden_dropout_prob=0.1)
    ours = copy.deepcopy(theirs)
    accelerate(ours, verbose=False)
    image = torch.randn(4, 3, *EXACT)
    ours.train(), theirs.train()
    means = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            means.append(torch.stack([model(image).pooler_output for _ in range(100)]).mean(0))
    assert len(calls) == 400
    assert not torch.equal(ours(image).pooler_output, ours(image).pooler_output)
    assert (means[0] - means[1]).abs().mean() < 0.15 * means[0].abs().mean(), "the same mean over many draws"


@not_in_old_layout
def test_gradient_checkpointing_recomputes_and_changes_nothing(calls):
    model = build().train()
    accelerate(model, verbose=False)
    image = torch.randn(1, 3, *RAGGED)
    expected = run(model, image)
    assert len(calls) == 4
    for layer in blocks(model):  # the layers alone, without the stages around them
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
            f, *args, use_reentrant=False
        )
    found = run(model, image)
    assert len(calls) == 12, "four more in the backward"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpointing_the_whole_model_works():
    model = build().train()
    accelerate(model, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    expected = run(model, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    found = run(model, image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dropout_of_features_drops_both_branches(calls):
    layer = blocks(build())[1]
    accelerate(layer, verbose=False)
    hidden = torch.randn(2, 18 * 23, 24)
    assert not torch.equal(layer(hidden, (18, 23))[0], hidden)
    layer.train()
    for dropout in [layer.attention.output.dropout, layer.output.dropout] if OLD_LAYOUT else [layer.dropout]:
        dropout.p = 1.0
    assert torch.equal(layer(hidden, (18, 23))[0], hidden)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_no_op_of_ours(calls):
    model = build().requires_grad_(False)
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    accelerate(model, verbose=False)
    traced = torch.jit.trace(lambda x: model(x).last_hidden_state, (image,), check_trace=False)
    assert not calls
    assert error(traced(image), expected) <= 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["kernels", "own-forward"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_into_one_graph(training, dropout, calls):
    model = build(depths=(2,), num_heads=(1,), attention_probs_dropout_prob=dropout).train(training)
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    accelerate(model, verbose=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    features = compiled(image).last_hidden_state
    if not (training and dropout):
        assert error(features, expected) <= 1e-5
        assert len(calls) == 2, "traced twice, once a layer"
    features.sum().backward()
    assert model.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0


def test_restore_gives_back_the_same_forward_and_bit_equal_outputs():
    model = build()
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    before = [(dict(b.__dict__), b.forward.__func__) for b in blocks(model)]
    report = accelerate(model, verbose=False)
    assert all("forward" in b.__dict__ for b in blocks(model))
    assert sorted(restore(model)) == sorted(name for names in report.swapped.values() for name in names)
    after = [(dict(b.__dict__), b.forward.__func__) for b in blocks(model)]
    assert [d.keys() for d, _ in before] == [d.keys() for d, _ in after]
    assert all(
        old is new is type(b).forward for (_, old), (_, new), b in zip(before, after, blocks(model), strict=True)
    )
    assert torch.equal(model(image).last_hidden_state, expected)


def test_parameters_and_names_stay():
    model = build()
    before = list(model.state_dict(keep_vars=True).items())
    accelerate(model, verbose=False)
    after = list(model.state_dict(keep_vars=True).items())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build().named_modules()]


def test_one_of_two_models_of_a_class_is_accelerated(calls):
    one, other = build(), build()
    accelerate(one, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    other(image)
    assert not calls
    one(image)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="nothing to restore: no layer of this SwinModel"):
        restore(other)


def test_scripting_is_refused_with_the_way_out():
    model = nn.Sequential(build())
    accelerate(model, verbose=False)
    for asked in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile .* ff\.restore\(model\) first"):
            torch.jit.script(asked)
    restore(model)
    assert not any("__prepare_scriptable__" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_accelerated_and_stands_alone(copied, calls):
    model = build()
    accelerate(model, verbose=False)
    twin = copied(model)
    for layer in blocks(twin):
        assert layer.forward.args == (layer,)
    image = torch.randn(1, 3, *EXACT)
    expected = model(image).last_hidden_state
    calls.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(image).last_hidden_state, expected)
    assert len(calls) == 4
    restore(twin)
    assert accelerate(model, verbose=False).already, "the other one stays accelerated"


def test_saves_and_loads(tmp_path):
    model = build()
    image = torch.randn(1, 3, *EXACT)
    expected = model(image).last_hidden_state
    accelerate(model, verbose=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.SwinModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(image).last_hidden_state, expected)
    accelerate(loaded, verbose=False)
    assert torch.equal(loaded(image).last_hidden_state, model(image).last_hidden_state)


def test_the_report_is_logged_and_names_the_backend(capsys, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "florence_fast"):
        report = accelerate(build())
    assert capsys.readouterr().out == "" and str(report) in caplog.text
    with ops.backend("torch"):
        assert accelerate(build()).backend == "torch"
    monkeypatch.setattr(native, "extension", lambda: None)
    report = accelerate(build())
    assert report.backend == f"torch: {native.NOT_BUILT}" and report.backend in str(report)
    assert caplog.records[-1].levelname == "WARNING" and native.NOT_BUILT in caplog.records[-1].getMessage()


def test_the_report_names_the_level(monkeypatch):
    for level in native.levels():
        monkeypatch.setenv("FLORENCE_FAST_CPU", level)
        assert accelerate(build()).backend == f"cpp: native kernels, {level}"


def test_the_second_call_says_that_it_is_done(capsys):
    model = build()
    first = accelerate(model, verbose=False)
    assert capsys.readouterr().out == ""
    forwards = [b.forward for b in blocks(model)]
    second = accelerate(model, verbose=False)
    assert second.already == first.swapped
    assert not second.swapped and not second.skipped
    assert all(old is b.forward for old, b in zip(forwards, blocks(model), strict=True))
    assert str(second).splitlines()[:-1] == [
        "already swapped  transformers SwinLayer         4: encoder.layers.0.blocks.0, encoder.layers.0.blocks.1, "
        "... encoder.layers.1.blocks.1",
        "already swapped  transformers SwinPatchMerging  1: encoder.layers.0.downsample",
    ]


def test_a_layer_alone_is_accelerated(calls):
    layer = blocks(build())[1]
    hidden = torch.randn(2, 18 * 23, 24)
    expected = layer(hidden, (18, 23))[0]
    assert accelerate(layer, verbose=False).swapped == {"transformers SwinLayer": [""]}
    assert error(layer(hidden, (18, 23))[0], expected) <= 1e-5
    assert len(calls) == 1


def test_nothing_to_swap_is_an_error_that_says_what_was_there():
    with pytest.raises(
        ValueError, match=r"nothing in this Linear .* looked for transformers' .*SwinLayer, .*, found nothing"
    ):
        accelerate(nn.Linear(2, 2))
    attention = type("WindowAttention", (nn.Identity,), {"__module__": "somebody.models"})
    with pytest.raises(ValueError, match=r"2 x unknown type somebody\.models\.WindowAttention"):
        accelerate(nn.Sequential(attention(), nn.GELU(), attention()))
    with pytest.raises(ValueError, match=r"4 x it runs on florence_fast\.ops as it is"):
        accelerate(Swin(SWIN))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        accelerate({})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        restore(None)
