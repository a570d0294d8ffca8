"""`accelerate(attention=False)` on transformers' Swins: their attention on windows that we cut, norms and MLP ours."""

import copy
import pickle

import pytest
import torch
from torch import nn

from florence_fast import ops
from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.hugging_face_models import (
    EXACT,
    RAGGED,
    assert_equal_to_rounding,
    blocks,
    build,
    error,
    get_part,
    not_in_old_layout,
    owner_and_name,
    run,
)
from tests.compat.test_hugging_face_family import FAMILY, INPUTS, tensors
from tests.compat.test_hugging_face_v2 import build as build_v2

transformers = pytest.importorskip("transformers")
calls = third_party.calls

BUILDS = {"swin": build, "swinv2": build_v2}
COUNTS = {
    "swin": {"layer_norm": 8, "mlp": 4, "patch_merging": 1, "window_attention": 0},
    "swinv2": {"layer_norm": 9, "mlp": 4, "patch_merging": 0, "window_attention": 0},
}


def pair(kind, **changes):
    ours, theirs = (BUILDS[kind](**changes) for _ in range(2))
    accelerate(ours, attention=False, verbose=False)
    return ours, theirs


def count(calls):
    return {name: calls.count(name) for name in COUNTS["swin"]}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("size", [RAGGED, EXACT], ids=["ragged", "exact"])  # the last map of the exact: one window
def test_outputs_and_gradients(kind, size, calls):
    ours, theirs = pair(kind)
    image = torch.randn(2, 3, *size)
    found, expected = ours(image).last_hidden_state, theirs(image).last_hidden_state
    assert error(found, expected) <= 1e-5
    assert count(calls) == COUNTS[kind]
    assert_equal_to_rounding(*(run(model.double(), image.double()) for model in (ours, theirs)), 1e-10)


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bfloat16_is_no_worse_than_theirs(kind, autocast):
    ours, theirs = pair(kind)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.div_(3))  # with larger weights, scores round by more than they differ
    true = copy.deepcopy(theirs).double()
    if not autocast:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    # The error of one tensor behind an attention that is the same in both is a matter of luck: a mean of some images.
    errors = {}
    for _ in range(4):
        image = torch.randn(2, 3, *RAGGED)
        exact = run(true, image.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [run(model, image if autocast else image.bfloat16()) for model in (ours, theirs)]
        for name in exact:
            errors.setdefault(name, []).append([error(values[name], exact[name]) for values in found])
    errors = {name: [sum(column) / len(column) for column in zip(*rows, strict=True)] for name, rows in errors.items()}
    assert errors["output"][0] <= 2 * errors["output"][1]
    assert not {name: pair for name, pair in errors.items() if pair[0] > 2 * pair[1] + 1e-2}
    assert sum(ours for ours, _ in errors.values()) <= sum(theirs for _, theirs in errors.values())


@pytest.mark.parametrize("row", FAMILY, ids=[row[0] for row in FAMILY])
def test_all_that_is_built_on_a_swin(row, calls):
    model, config, arguments, layers, merges = row
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments())).eval()
    inputs = INPUTS.get(model, lambda: {"pixel_values": torch.randn(1, 3, 64, 64)})()
    with torch.no_grad():
        expected = tensors(built(**inputs))
        report = accelerate(built, attention=False, verbose=False)
        found = tensors(built(**inputs))
    assert sum(len(names) for names in report.swapped.values()) == layers + merges and not report.skipped
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) <= 2e-5
    assert calls.count("mlp") == layers and "window_attention" not in calls


@pytest.mark.parametrize("kind", BUILDS)
def test_every_dropout_draws_the_same_numbers(kind, calls):
    rates = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2, "drop_path_rate": 0.3}
    ours, theirs = (model.train() for model in pair(kind, **rates))
    image = torch.randn(4, 3, *RAGGED)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(model(image).last_hidden_state)
    assert error(*found) <= 1e-5
    assert count(calls) == COUNTS[kind]


@not_in_old_layout
@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_the_attention_that_the_model_was_set_to_is_called(name, calls, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = []
    known = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)

    def counting(*args, **kwargs):
        asked.append(name)
        return known(*args, **kwargs)

    model = build(attn_implementation="eager" if name == "flex_attention" else name)
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, counting)
    for layer in blocks(model):
        layer.attention.config = copy.copy(layer.attention.config)
        layer.attention.config._attn_implementation_internal = name
    accelerate(model, attention=False, verbose=False)
    assert error(model(image).last_hidden_state, expected) <= 1e-5
    assert len(asked) == 4 and count(calls) == COUNTS["swin"]


def twice(module, args, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("part", ["attention", "attention.q_proj", "attention.o_proj", "layernorm_before", "mlp.fc1"])
def test_hooks_anywhere_are_run(part, calls):
    ours, theirs = pair("swin")
    image = torch.randn(1, 3, *RAGGED)
    plain = ours(image).last_hidden_state
    for model in (ours, theirs):
        get_part(blocks(model)[1], part).register_forward_hook(twice)
    calls.clear()
    found = ours(image).last_hidden_state
    assert error(found, theirs(image).last_hidden_state) <= 1e-5 < error(found, plain)
    fewer = {"layernorm_before": "layer_norm", "mlp.fc1": "mlp"}.get(part)
    assert count(calls) == {name: n - (name == fewer) for name, n in COUNTS["swin"].items()}


def test_an_adapter_around_q_keeps_the_rest_of_the_layer_ours(calls):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    models = [build(), build()]
    for model in models:
        owner, name = owner_and_name(blocks(model)[0], "attention.q_proj")
        getattr(owner, name).__class__ = Twice
    ours, theirs = models
    assert accelerate(copy.deepcopy(ours), verbose=False).skipped, "with attention, the layer is left alone"
    assert not accelerate(ours, attention=False, verbose=False).skipped
    image = torch.randn(1, 3, *EXACT)
    assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    assert count(calls) == COUNTS["swin"]


def test_attention_weights_come_from_their_own_forward(calls):
    ours, theirs = pair("swin", attn_implementation="eager")
    image = torch.randn(1, 3, *EXACT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        found = ours(image, output_attentions=True).attentions
    expected = theirs(image, output_attentions=True).attentions
    assert found and all(error(f, e) <= 1e-5 for f, e in zip(found, expected, strict=True))
    assert count(calls) == {**COUNTS["swin"], "layer_norm": 0, "mlp": 0}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("part", ["attention", "merging", "mlp", "norm"])
def test_each_part_is_switched_off_alone(kind, part, calls, monkeypatch):
    products = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: products.append(args) or linear(*args))
    ours, theirs = BUILDS[kind](), BUILDS[kind]()
    accelerate(ours, verbose=False, **{part: False})
    image = torch.randn(1, 3, *RAGGED)
    assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    merge = "patch_merging" if kind == "swin" else "layer_norm"
    expected = {**COUNTS[kind], "window_attention": 4}
    switched_off = {"attention": "window_attention", "merging": merge, "mlp": "mlp", "norm": "layer_norm"}[part]
    expected[switched_off] -= {"merging": 1, "norm": 8}.get(part, 4)
    assert count(calls) == expected
    in_merge = kind == "swinv2" and part != "merging"
    assert len(products) == (0 if part == "attention" else 8) + in_merge, "q, k, v together, and the projection"


def test_nothing_but_merges_left_to_do():
    model = build()
    report = accelerate(model, attention=False, mlp=False, norm=False, verbose=False)
    assert report.swapped == {"transformers SwinPatchMerging": ["encoder.layers.0.downsample"]}
    assert set(report.skipped.values()) == {"left as it is by attention=False, mlp=False, norm=False"}


@pytest.mark.parametrize("kind", BUILDS)
def test_compiles_copies_pickles_and_goes_back(kind, calls):
    model = BUILDS[kind](depths=(2, 1))
    image = torch.randn(1, 3, *RAGGED)
    expected = model(image).last_hidden_state
    keys = list(model.state_dict())
    accelerate(model, attention=False, verbose=False)
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert error(copied(image).last_hidden_state, expected) <= 1e-5 and calls.count("mlp") == 3
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert error(compiled(image).last_hidden_state, expected) <= 1e-5
    assert len(restore(model)) == 4
    assert torch.equal(model(image).last_hidden_state, expected)


@pytest.mark.parametrize("kind", BUILDS)
def test_gradient_checkpointing_changes_nothing(kind):
    model = pair(kind)[0].train()
    image = torch.randn(1, 3, *EXACT)
    expected = run(model, image)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
