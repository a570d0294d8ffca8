"""open_clip's and timm's surface, on the smallest registered model."""

import dataclasses

import pytest
import torch
from PIL import Image

import florence_fast as ff
from florence_fast.models import FeatureExtractor, Florence, registry
from florence_fast.models.factory import cast_weights
from tests.models.test_text import texts
from tests.models.tiny import COSWIN, FLORENCE


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Two more names in the registry for the length of a test."""
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    ff.register_model_config("florence_pico", FLORENCE)
    ff.register_model_config("coswin_pico", COSWIN)


def test_model_and_transforms_meet():
    model, train, evaluate = ff.create_model_and_transforms("florence_pico", img_size=24)
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    assert train(image).shape == evaluate(image).shape == (3, 24, 24)
    mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
    red = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
    torch.testing.assert_close(evaluate(image)[:, 12, 12], red, rtol=1e-3, atol=1e-3)
    assert model.encode_image(evaluate(image)[None]).shape == (1, 12)
    _, _, transform = ff.create_model_and_transforms("coswin_pico", features_only=True)
    assert transform(image).shape == (3, 32, 32)


def test_tokenizer_has_the_models_context():
    assert ff.get_tokenizer("florence_nano")(["a cat", "a dog"]).shape == (2, 16)
    assert ff.get_tokenizer("florence_tiny")("a cat").shape == (1, 77)
    assert ff.get_tokenizer("florence_nano", context_length=9)("a cat").shape == (1, 9)
    with pytest.raises(ValueError, match="coswin_pico is an image tower and reads no text"):
        ff.get_tokenizer("coswin_pico")


def test_nano_reads_images_and_words():
    model, tokenizer = ff.create_model("florence_nano").eval(), ff.get_tokenizer("florence_nano")
    u, v, _ = model(torch.randn(2, 3, 64, 64), tokenizer(["a cat", "a dog", "a red fruit"]))
    assert (u.shape, v.shape) == ((2, 256), (3, 256))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("amp", torch.float32),
        ("amp_bf16", torch.float32),
        ("bf16", torch.bfloat16),
    ],
)
def test_precision_words(precision, dtype):
    model = ff.create_model("florence_pico", precision=precision)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    norms = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm) for p in m._parameters}
    kept = {n for n in dtypes if n.endswith(("relative_position_bias_table", "logit_scale"))} | norms
    assert {dtypes[name] for name in kept} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - kept} == {dtype}
    u, v, factor = model(torch.randn(1, 3, 32, 32), texts(4))
    assert (u.dtype, v.dtype, factor.dtype) == (dtype, dtype, torch.float32)
    assert u.isfinite().all() and v.isfinite().all()


def test_fp16_weights():
    model = ff.create_model("coswin_pico", precision="fp16")
    assert {p.dtype for p in model.parameters() if p.ndim == 4} == {torch.float16}
    assert model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("pure_bf16", torch.bfloat16), ("pure_fp16", torch.float16)])
def test_pure_words_cast_every_weight_and_the_model_runs(precision, dtype):
    model = ff.create_model("florence_pico", precision=precision)
    assert {p.dtype for p in model.parameters()} == {dtype}
    u, v, _ = model(torch.randn(1, 3, 32, 32, dtype=dtype), texts(4))
    assert (u.dtype, v.dtype) == (dtype, dtype)
    assert u.isfinite().all() and v.isfinite().all()


def test_weights_are_cast_back_and_float64_is_left_alone():
    model = ff.create_model("florence_pico", precision="pure_bf16")
    cast_weights(model, "bf16")
    assert (model.logit_scale.dtype, model.visual.norm.bias.dtype) == (torch.float32, torch.float32)
    assert {p.dtype for p in cast_weights(model, "amp_bf16").parameters()} == {torch.float32}
    assert {p.dtype for p in cast_weights(model.double(), "bf16").parameters()} == {torch.float64}


def test_overrides_reach_the_part_they_belong_to():
    model = ff.create_model("florence_pico", force_image_size=48, window_size=3, force_context_length=7, in_chans=1)
    assert (model.config.image.img_size, model.config.image.window_size, model.context_length) == (48, 3, 7)
    assert model(torch.randn(1, 1, 16, 16))[0].shape == (1, 12)
    assert ff.create_model("coswin_pico", num_classes=5, drop_path_rate=0.3)(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    assert ff.create_model("florence_pico", image_mean=[0, 0, 0]).config.image_mean == (0, 0, 0)
    assert set(ff.create_model("florence_pico", output_dict=True)(torch.randn(1, 3, 16, 16))) == {
        "image_features",
        "logit_scale",
    }


def test_features_only_of_either_kind_of_name(tmp_path):
    whole = ff.create_model("florence_pico")
    whole.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    expected = whole.visual.eval().forward_intermediates(image, intermediates_only=True)
    for name in ("florence_pico", "coswin_pico"):
        backbone = ff.create_model(name, pretrained=tmp_path, features_only=True, out_indices=(1,))
        assert isinstance(backbone, FeatureExtractor)
        (shown,) = backbone(image)
        assert torch.equal(shown, expected[1])
    nhwc = ff.create_model("coswin_pico", features_only=True, output_fmt="NHWC")(image)
    assert [tuple(m.shape) for m in nhwc] == [(1, 8, 8, 8), (1, 4, 4, 16)]


def test_what_was_saved_is_what_is_created(tmp_path):
    saved = ff.create_model("florence_pico", image_mean=(0.1, 0.2, 0.3))
    saved.set_input_size(img_size=48, window_size=6)
    saved.save_pretrained(tmp_path)
    for made in (
        ff.create_model("florence_pico", pretrained=tmp_path),
        ff.create_model("florence_pico", pretrained=str(tmp_path / "model.safetensors")),
        ff.create_model(f"local-dir:{tmp_path}"),
    ):
        assert made.config == saved.config and not made.training
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), saved.parameters(), strict=True))
    narrower = ff.create_model("florence_pico", pretrained=tmp_path, window_size=3)
    assert narrower.visual.layers[0].blocks[0].attn.relative_position_bias_table.shape == (25, 1)
    model, transform = ff.create_model_from_pretrained("florence_pico", tmp_path)
    assert not model.training and transform(Image.new("RGB", (9, 9))).shape == (3, 48, 48)
    assert isinstance(ff.create_model_from_pretrained("florence_pico", tmp_path, return_transform=False), Florence)


def test_the_tokenizer_of_what_was_saved_has_its_length_and_fits_its_vocabulary(tmp_path):
    Florence(FLORENCE).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"text\.vocab_size must be at least 49408, .* got 64"):
        ff.get_tokenizer(f"local-dir:{tmp_path / 'small'}")
    whole = dataclasses.replace(FLORENCE, text=dataclasses.replace(FLORENCE.text, vocab_size=49408))
    Florence(whole).save_pretrained(tmp_path / "whole")
    assert ff.get_tokenizer(f"local-dir:{tmp_path / 'whole'}")("a cat").shape == (1, 12)


def test_weights_of_another_model_are_refused_by_field(tmp_path):
    wider = dataclasses.replace(FLORENCE, image=dataclasses.replace(COSWIN, embed_dim=16, num_heads=(2, 4)))
    Florence(wider).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        ValueError, match=r"another model than florence_pico: image\.embed_dim 16 instead of 8; image\.num"
    ):
        ff.create_model("florence_pico", pretrained=tmp_path / "wide")
    ff.create_model("coswin_pico").save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="ImageConfig instead of FlorenceConfig"):
        ff.create_model("florence_pico", pretrained=tmp_path / "tower")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ff.create_model("florence_nanoo"), ValueError, "did you mean 'florence_nano'"),
        (lambda: ff.create_model("florence_pico", precision="bf61"), ValueError, "precision 'bf61'.*'bf16'"),
        (lambda: ff.create_model("florence_pico", windw_size=3), TypeError, "'windw_size'.*'window_size'"),
        (lambda: ff.create_model("coswin_pico", context_length=3), TypeError, "'context_length' belongs to a dual"),
        (lambda: ff.create_model("florence_pico", num_classes=3), ValueError, "a tower of Florence has no classifier"),
        (lambda: ff.create_model("florence_pico", "artist"), ValueError, "pretrained tag of florence_pico 'artist'"),
        (lambda: ff.create_model("florence_pico", "no/where"), FileNotFoundError, "'no/where': no such file"),
        (lambda: ff.create_model("local-dir:no/where"), FileNotFoundError, "no checkpoint at no/where"),
        (lambda: ff.create_model_from_pretrained("florence_pico"), ValueError, "needs pretrained="),
    ],
)
def test_wrong_calls_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
