"""Converting state_dicts that lack a tensor or hold a misshapen one: a ValueError, in every layout, for every key."""

import re
from collections.abc import Iterable

import pytest
import torch

from florence_fast.compat import layouts
from florence_fast.compat.convert import convert
from florence_fast.compat.microsoft import coswin_from_swin
from florence_fast.models import Florence, FlorenceConfig, ImageConfig, Swin, TextConfig
from florence_fast.models.layouts import to_our_layout
from florence_fast.models.pretrained import load_state

IMAGE = ImageConfig("swin", 8, (1, 1), (1, 2), img_size=32, window_size=2, num_classes=3)
TEXT = TextConfig(16, heads=1, layers=1, vocab_size=8, context_length=4)
SWIN = Swin(IMAGE)
DUAL = Florence(FlorenceConfig(ImageConfig("swin", 8, (1, 1), (1, 2), img_size=32, window_size=2), TEXT, 6))


def clip_text() -> dict[str, torch.Tensor]:
    """A text tower under Hugging Face's names."""
    names = {"token_embedding.weight": (8, 16), "position_embedding.weight": (4, 16)}
    state = {f"text_model.embeddings.{name}": torch.ones(shape) for name, shape in names.items()}
    block = "text_model.encoder.layers.0."
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state |= {
            f"{block}self_attn.{part}.weight": torch.ones(16, 16),
            f"{block}self_attn.{part}.bias": torch.ones(16),
        }
    for name, shape in {"fc1": (64, 16), "fc2": (16, 64)}.items():
        state |= {f"{block}mlp.{name}.weight": torch.ones(shape), f"{block}mlp.{name}.bias": torch.ones(shape[0])}
    for name in (f"{block}layer_norm1", f"{block}layer_norm2", "text_model.final_layer_norm"):
        state |= {f"{name}.weight": torch.ones(16), f"{name}.bias": torch.ones(16)}
    return state


def unicl() -> dict[str, torch.Tensor]:
    """A dual encoder under UniCL's names."""
    names = {"visual.": "image_encoder.", "text.": "lang_encoder."}
    state = {}
    for name, tensor in DUAL.state_dict().items():
        if name.endswith("_projection.weight"):
            name, tensor = name.removesuffix(".weight"), tensor.T
        for ours, theirs in names.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        state[name] = tensor
    return state


def open_clip() -> dict[str, torch.Tensor]:
    """A text tower under open_clip's names."""
    state = {"text_projection": torch.ones(16, 6), "logit_scale": torch.ones(())}
    for name, tensor in DUAL.text.state_dict().items():
        state[f"transformer.{name}" if name.startswith("resblocks.") else name] = tensor
    return state


LAYOUTS = {
    "microsoft": SWIN.state_dict(),
    "hugging_face": layouts.hugging_face.write(SWIN.state_dict(), IMAGE),
    "timm": layouts.timm.write(SWIN.state_dict(), IMAGE),
    "torchvision": layouts.torchvision.write(SWIN.state_dict(), IMAGE),
    "clip_text": clip_text(),
    "unicl": unicl(),
    "open_clip": open_clip(),
    "ours": DUAL.state_dict(),
}
DAMAGE = {
    "flat": lambda t: t.flatten(),
    "one axis more": lambda t: t[None],
    "no axes": lambda t: torch.zeros(()),
    "no rows": lambda t: t.new_zeros(0, *t.shape[1:]),
    "no columns": lambda t: t.new_zeros(*t.shape[:-1], 0),
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.ndim else t[None],
}


def one_of_each_kind(layout: str) -> Iterable[str]:
    """The floating-point tensors whose names differ in more than numbers and weight or bias."""
    names = [name for name, tensor in LAYOUTS[layout].items() if tensor.is_floating_point()]
    return {re.sub(r"\d+|weight|bias$", "", name): name for name in names}.values()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_checkpoint_is_read(layout):
    assert convert(LAYOUTS[layout]).missing == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_without_one_tensor_is_refused_or_the_tensor_is_listed(layout):
    for name in one_of_each_kind(layout):
        state = {key: tensor for key, tensor in LAYOUTS[layout].items() if key != name}
        try:
            done = convert(state)
        except ValueError:
            continue
        # less one tensor, what is left may be a smaller model: one without classifier, biases or a last block
        assert done.missing or len(done.state) < len(LAYOUTS[layout]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_misshapen_tensor_is_refused_or_another_model(layout, damage):
    """What is accepted has the shapes of the model that its configuration describes."""
    refused = 0
    for name in one_of_each_kind(layout):
        state = {**LAYOUTS[layout], name: DAMAGE[damage](LAYOUTS[layout][name])}
        if state[name].shape == LAYOUTS[layout][name].shape:
            continue
        try:
            convert(state, warm_start_coswin=layout in ("microsoft", "timm"))
        except ValueError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_misshapen_tensor_does_not_reach_a_model(damage):
    for name, tensor in SWIN.state_dict().items():
        state = {**SWIN.state_dict(), name: DAMAGE[damage](tensor)}
        if state[name].shape != tensor.shape:
            try:
                load_state(Swin(IMAGE), to_our_layout(state))
            except ValueError as error:
                assert name in str(error) or name.startswith("head.")
            else:
                assert name.startswith("head.") or "bias_table" in name, name


def test_the_missing_part_of_a_joined_tensor_is_named():
    state = LAYOUTS["hugging_face"]
    for name in (name for name in state if ".attention.self.key." in name):
        with pytest.raises(ValueError, match=r"attn\.k\.(weight|bias) is missing"):
            to_our_layout({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match=r"layers\.0\.downsample\.norm\.weight \(4C,\), got \(16, 32\) and none"):
        coswin_from_swin({k: t for k, t in SWIN.state_dict().items() if k != "layers.0.downsample.norm.weight"})
