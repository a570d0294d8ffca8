"""Files in Microsoft's layouts, made from random weights: Swin, both spellings of UniCL, and CoSwin begun from Swin."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from florence_fast.compat.microsoft import coswin_from_swin, warm_start_coswin
from florence_fast.models import CoSwin, Florence, Swin, get_model_config
from florence_fast.models.pretrained import load_checkpoint, read_checkpoint
from tests.models.test_text import texts
from tests.models.tiny import COSWIN, FLORENCE, SWIN, TEXT

UNICL = dataclasses.replace(FLORENCE, image=SWIN, text=dataclasses.replace(TEXT, act="quick_gelu", norm_eps=1e-12))


def swin_layout(prefix="", window=4, num_classes=0, heads=(1, 2), width=8):
    """Microsoft's names and shapes of a two-stage Swin, written out, with the buffers that its files carry."""
    shapes = {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    shapes |= norm("patch_embed.norm", width)
    for stage in (0, 1):
        c = width * 2**stage
        for block in (0, 1):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", c) | norm(f"{name}.norm2", c)
            shapes |= linear(f"{name}.attn.qkv", 3 * c, c) | linear(f"{name}.attn.proj", c, c)
            shapes |= linear(f"{name}.mlp.fc1", 4 * c, c) | linear(f"{name}.mlp.fc2", c, 4 * c)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
        shapes[f"layers.{stage}.blocks.1.attn_mask"] = (4, window**2, window**2)
    shapes |= norm("layers.0.downsample.norm", 4 * width) | {"layers.0.downsample.reduction.weight": (16, 32)}
    shapes |= norm("norm", 2 * width)
    if num_classes:
        shapes |= linear("head", num_classes, 2 * width)
    return {prefix + name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def text_layout(prefix):
    """UniCL's names and shapes of the text tower, written out."""
    w = TEXT.width
    shapes = {"token_embedding.weight": (TEXT.vocab_size, w), "positional_embedding": (TEXT.context_length, w)}
    for layer in range(TEXT.layers):
        name = f"resblocks.{layer}"
        shapes |= {f"{name}.attn.in_proj_weight": (3 * w, w), f"{name}.attn.in_proj_bias": (3 * w,)}
        shapes |= linear(f"{name}.attn.out_proj", w, w) | norm(f"{name}.ln_1", w) | norm(f"{name}.ln_2", w)
        shapes |= linear(f"{name}.mlp.c_fc", 4 * w, w) | linear(f"{name}.mlp.c_proj", w, 4 * w)
    shapes |= norm("ln_final", w)
    return {prefix + name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, out_features, in_features):
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


@pytest.fixture
def swin_file(tmp_path):
    path = tmp_path / "swin.pth"
    torch.save({"model": swin_layout(num_classes=10)}, path)
    return path


def test_every_name_of_a_swin_file_finds_its_place(swin_file):
    model = Swin(dataclasses.replace(SWIN, num_classes=10))
    assert load_checkpoint(model, swin_file) == []
    written = torch.load(swin_file, weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[name]), name


def test_a_classifier_of_another_size_is_left_out(swin_file):
    model = Swin(dataclasses.replace(SWIN, num_classes=3))
    assert load_checkpoint(model, swin_file) == ["head.weight", "head.bias"]
    assert load_checkpoint(Swin(SWIN), swin_file) == []


SPELLINGS = {
    "released": ("image_encoder.", "text_encoder.", "image_projection", "text_projection"),
    "lang": ("image_encoder.", "lang_encoder.", "image_projection", "lang_projection"),
    "old": ("visual.", "text.", "vision_projection", "text_projection"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_unicl_file_gives_unicls_features(tmp_path, spelling):
    image, text, image_projection, text_projection = SPELLINGS[spelling]
    state = swin_layout(image) | text_layout(text) | {"logit_scale": torch.tensor(1.5)}
    state[image_projection], state[text_projection] = torch.randn(16, 12), torch.randn(16, 12)
    torch.save({"model": state}, tmp_path / "unicl.pth")
    model = Florence(UNICL).eval()
    assert load_checkpoint(model, tmp_path / "unicl.pth") == []
    pixels, tokens = torch.randn(2, 3, 32, 32), texts(4, 6)
    u, v, factor = model(pixels, tokens)
    torch.testing.assert_close(u, F.normalize(model.visual(pixels) @ state[image_projection], dim=1))
    torch.testing.assert_close(v, F.normalize(model.text(tokens) @ state[text_projection], dim=1))
    assert factor.item() == pytest.approx(math.exp(1.5))
    torch.testing.assert_close(model.text.resblocks[1].mlp.c_fc.weight, state[f"{text}resblocks.1.mlp.c_fc.weight"])


def test_the_named_unicl_models_start_and_run_as_the_released_code():
    config = get_model_config("unicl_swin_tiny")
    assert (config.text.act, config.text.norm_eps, config.max_logit_scale) == ("quick_gelu", 1e-12, None)
    small = dataclasses.replace(UNICL, init_logit_scale=config.init_logit_scale)
    assert Florence(small).logit_scale.item() == pytest.approx(1.0)


def test_the_stem_is_carried_over_exactly(swin_file):
    swin, coswin = Swin(SWIN), CoSwin(COSWIN)
    load_checkpoint(swin, swin_file)
    warm_start_coswin(coswin, swin_file)
    image = torch.randn(2, 3, 32, 24)
    torch.testing.assert_close(coswin.patch_embed(image), swin.patch_embed(image), rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 8, 8, 8)
    for ours, theirs in zip(coswin.layers[0].blocks, swin.layers[0].blocks, strict=True):
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_merge_reads_the_same_neighbours(swin_file):
    swin = Swin(SWIN)
    load_checkpoint(swin, swin_file)
    kernel = coswin_from_swin(swin.state_dict())["layers.0.downsample.proj.weight"]
    merge, x = swin.layers[0].downsample, torch.randn(2, 6, 4, 8)
    x_gathered = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
    expected = (x_gathered * merge.norm.weight) @ merge.reduction.weight.T
    found = F.conv2d(x.permute(0, 3, 1, 2), kernel, stride=2, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_tower_of_a_florence_starts_from_a_unicl_file_with_another_window(tmp_path):
    torch.save({"model": swin_layout("image_encoder.") | {"image_projection": torch.randn(16, 12)}}, tmp_path / "u.pth")
    model = Florence(dataclasses.replace(FLORENCE, image=dataclasses.replace(COSWIN, window_size=6)))
    warm_start_coswin(model, tmp_path / "u.pth")
    written = read_checkpoint(tmp_path / "u.pth").state
    assert torch.equal(model.visual.norm.weight, written["visual.norm.weight"])
    assert model(torch.randn(1, 3, 48, 48))[0].shape == (1, 12)


def test_what_is_no_plain_swin_is_refused(swin_file, tmp_path):
    with pytest.raises(ValueError, match="load Swin with pretrained="):
        warm_start_coswin(Swin(SWIN), swin_file)
    with pytest.raises(ValueError, match=r"shape \(C, 3, 4, 4\), got none"):
        coswin_from_swin({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got \(8, 3, 7, 7\)"):
        coswin_from_swin(CoSwin(COSWIN).state_dict())


def test_convolution_has_no_bias_in_a_merge():
    merge = CoSwin(COSWIN).layers[0].downsample
    assert isinstance(merge.proj, nn.Conv2d) and merge.proj.bias is None
