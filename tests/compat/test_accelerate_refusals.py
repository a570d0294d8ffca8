"""Which layers of Hugging Face's Swin `accelerate` refuses, what it sees later, and layers of other versions."""

import copy
import inspect

import pytest
import torch
from torch import nn

from florence_fast.compat.accelerate import accelerate, hugging_face, restore
from tests.compat.hugging_face_models import (
    EXACT,
    OLD_LAYOUT,
    blocks,
    build,
    error,
    get_part,
    owner_and_name,
)

transformers = pytest.importorskip("transformers")


class TwiceLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def twice(linear):
    other = TwiceLinear(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def replace_query(layer):
    setattr(*owner_and_name(layer, "attention.q_proj"), twice(get_part(layer, "attention.q_proj")))


class PackedWeight(nn.Parameter):
    """As quantised weights are: a parameter of another type in a plain linear."""


def pack_query(layer):
    query = get_part(layer, "attention.q_proj")
    query.weight = PackedWeight(query.weight.detach())


def hook_attention(layer):
    layer.attention.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))


def wrap_layer(layer):
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)


def flex(layer):
    if OLD_LAYOUT:
        pytest.skip("until some 5.x transformers' Swin has one attention")
    layer.attention.config = copy.copy(layer.attention.config)
    layer.attention.config._attn_implementation_internal = "flex_attention"


def lose_a_part(layer):
    delattr(*owner_and_name(layer, "attention.k_proj"))


def widen_table(layer):
    owner, name = owner_and_name(layer, "attention.relative_position_bias.relative_position_bias_table")
    setattr(owner, name, nn.Parameter(torch.zeros(7 * 9, getattr(owner, name).shape[1])))


REFUSALS = [
    (replace_query, "q, k and v must come from plain nn.Linear, got TwiceLinear"),
    (pack_query, "the weights of q, k and v must be plain parameters, got PackedWeight"),
    (hook_attention, "its attention has hooks"),
    (wrap_layer, "its forward is already replaced by something else"),
    (flex, "it was set to the attention 'flex_attention'"),
    (lose_a_part, "a version of transformers with other parts: .*(k_proj|key)"),
    (widen_table, r"the windows must be square, got a bias table of shape \(63, 1\)"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[change.__name__ for change, _ in REFUSALS])
def test_a_layer_that_is_not_as_it_should_be_is_left_alone(change, reason):
    model = build()
    change(blocks(model)[0])
    own = blocks(model)[0].__dict__.get("forward")
    report = accelerate(model, verbose=False)
    assert len(report.swapped["transformers SwinLayer"]) == 3
    assert list(report.skipped) == ["encoder.layers.0.blocks.0"]
    assert blocks(model)[0].__dict__.get("forward") is own
    with pytest.raises(ValueError, match=f"found what looks like window attention: 1 x {reason}"):
        accelerate(blocks(model)[0])
    assert "skipped" in str(report) and "1 left alone: " in str(report)


HOOKS = [
    f"register_{kind}" for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", ["attention", "attention.v_proj", "attention.relative_position_bias"])
def test_hooks_of_every_kind_are_seen(register, part):
    layer = blocks(build())[0]
    handle = getattr(get_part(layer, part), register)(lambda *args: None)
    with pytest.raises(ValueError, match="its attention has hooks"):
        accelerate(layer)
    handle.remove()
    assert accelerate(layer, verbose=False).swapped


def wrap_query(layer):
    query = get_part(layer, "attention.q_proj")
    own = query.forward
    query.forward = lambda x: 2 * own(x)


@pytest.mark.parametrize("change", [replace_query, hook_attention, wrap_query], ids=lambda change: change.__name__)
def test_what_is_put_in_later_is_not_passed_over(change, calls):
    ours, theirs = build(), build()
    accelerate(ours, verbose=False)
    image = torch.randn(1, 3, *EXACT)
    for model in (ours, theirs):
        change(blocks(model)[1])
    assert error(ours(image).last_hidden_state, theirs(image).last_hidden_state) <= 1e-5
    assert len(calls) == 3


def test_a_subclass_is_taken_unless_its_forward_is_another():
    layer = blocks(build())[0]
    theirs = type(layer)
    layer.__class__ = type("Wrapped", (theirs,), {})
    assert accelerate(layer, verbose=False).swapped == {"transformers SwinLayer": [""]}
    restore(layer)
    layer.__class__ = type("Other", (theirs,), {"forward": lambda self, x, size: (x, None)})
    with pytest.raises(ValueError, match="1 x Other has a forward of its own"):
        accelerate(layer)


def test_another_signature_is_refused(monkeypatch):
    layer = blocks(build())[0]
    accelerate(layer, verbose=False)
    others = {name: part for name, part in hugging_face.FORWARDS.items() if name is not layer.forward.func}
    assert len(others) == len(hugging_face.FORWARDS) - 1
    monkeypatch.setattr(hugging_face, "FORWARDS", others)
    with pytest.raises(ValueError, match="1 x a version of transformers whose forward takes other arguments: hid"):
        accelerate(blocks(build())[0])


def old_layer(name):
    """A layer in the layout of transformers 4.x, which later ones keep for Donut and CLAP."""
    if name == "donut":
        from transformers.models.donut import modeling_donut_swin as donut

        config, cls = transformers.DonutSwinConfig(window_size=4, drop_path_rate=0.0), donut.DonutSwinLayer
    else:
        from transformers.models.clap import modeling_clap as clap

        config, cls = transformers.ClapAudioConfig(window_size=4, drop_path_rate=0.0), clap.ClapAudioLayer
    torch.manual_seed(0)
    layer = cls(config, 24, (18, 23), 2, shift_size=2).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("name", ["donut", "clap"])
def test_layers_in_the_old_layout(name, calls):
    layer = old_layer(name)
    hidden = torch.randn(2, 18 * 23, 24)
    expected = layer(hidden, (18, 23), output_attentions=True)
    accelerate(layer, verbose=False)
    found = layer(hidden, (18, 23), output_attentions=False)
    assert error(found[0], expected[0]) <= 1e-5 and len(found) == len(calls) == 1
    weights = layer(hidden, (18, 23), output_attentions=True)
    assert torch.equal(weights[1], expected[1]) and len(calls) == 1


class LayerOfFour(nn.Module):
    """The arguments of transformers 4.x around a layer of the same layout."""

    def forward(self, hidden_states, input_dimensions, head_mask=None, output_attentions=False, always_partition=False):
        out = type(self).__mro__[2].forward(self, hidden_states, input_dimensions, output_attentions, always_partition)
        return (out[0] if head_mask is None else out[0] * head_mask, *out[1:])


def test_the_arguments_of_transformers_4(calls, monkeypatch):
    layer = old_layer("donut")
    if "head_mask" in inspect.signature(type(layer).forward).parameters:
        pytest.skip("this is transformers 4.x: the next test asks its own layers")
    layer.__class__ = type("SwinLayer", (LayerOfFour, type(layer)), {"__module__": "of_four"})
    monkeypatch.setattr(hugging_face, "LAYERS", {("of_four", "SwinLayer")})
    hidden = torch.randn(2, 18 * 23, 24)
    expected = layer(hidden, (18, 23), None, False, False)[0]
    assert accelerate(layer, verbose=False).swapped == {"transformers SwinLayer": [""]}
    assert error(layer(hidden, (18, 23), None, False, False)[0], expected) <= 1e-5
    assert len(calls) == 1
    masked = layer(hidden, (18, 23), torch.zeros(()), False, False)[0]
    assert len(calls) == 1 and not masked.any()


def test_a_head_mask_runs_their_own_forward(calls):
    model = build(depths=(1,), num_heads=(2,))  # one layer, since theirs asks a stage's mask for one by layer
    if "head_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip("transformers 5.x switches no heads off")
    image = torch.randn(1, 3, *EXACT)
    usual = model(image).last_hidden_state
    first_alone = torch.tensor([[1.0, 0.0]])
    expected = model(image, head_mask=first_alone).last_hidden_state
    accelerate(model, verbose=False)
    found = model(image, head_mask=first_alone).last_hidden_state
    assert error(found, expected) <= 1e-5 < error(usual, expected)
    assert not calls
    model(image)
    assert len(calls) == 1
