"""The dual encoder: its features, its temperature in both kinds, and what training code asks of it."""

import dataclasses
import math

import pytest
import torch

from florence_fast.models import Florence
from tests.models.test_text import texts
from tests.models.tiny import FLORENCE


@pytest.fixture
def model():
    return Florence(FLORENCE).eval()


def test_features_and_factor(model):
    image, text = torch.randn(3, 3, 32, 32), texts(4, 7)
    u, v, factor = model(image, text)
    assert (u.shape, v.shape) == ((3, 12), (2, 12))
    torch.testing.assert_close(u.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(factor, torch.tensor(1 / 0.07))
    torch.testing.assert_close(u, torch.nn.functional.normalize(model.image_projection(model.visual(image)), dim=1))
    torch.testing.assert_close(v, torch.nn.functional.normalize(model.text_projection(model.text(text)), dim=1))
    assert torch.equal(model.encode_image(image, normalize=True), u)
    assert torch.equal(model.encode_text(text), model.text_projection(model.text(text)))


def test_either_input_may_be_left_out(model):
    image, text = torch.randn(1, 3, 32, 32), texts(4)
    assert model(image=image)[1] is None
    assert model(text=text)[0] is None
    model.output_dict = True
    assert set(model(image=image)) == {"image_features", "logit_scale"}
    assert set(model(image, text)) == {"image_features", "text_features", "logit_scale"}


def test_log_scale_is_clamped_to_its_bounds(model):
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        model.clamp_logit_scale_()
        assert model.logit_scale.item() == pytest.approx(expected)


def test_plain_scale_is_the_factor_itself():
    model = Florence(dataclasses.replace(FLORENCE, logit_scale_kind="plain", init_logit_scale=1.0))
    assert model.logit_factor().item() == 1.0
    torch.nn.init.constant_(model.logit_scale, 250.0)
    model.clamp_logit_scale_()
    assert model.logit_factor().item() == 100.0
    free = Florence(dataclasses.replace(FLORENCE, logit_scale_kind="plain", max_logit_scale=None))
    torch.nn.init.constant_(free.logit_scale, 250.0)
    free.clamp_logit_scale_()
    assert free.logit_factor().item() == 250.0


def test_features_are_normalised_in_fp32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        u, v, _ = model(torch.randn(2, 3, 32, 32), texts(4, 5))
        assert model.encode_image(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    assert u.dtype == v.dtype == torch.float32
    torch.testing.assert_close(u.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


def test_float64_stays_float64(model):
    u, v, factor = model.double()(torch.randn(1, 3, 32, 32, dtype=torch.float64), texts(4))
    assert {u.dtype, v.dtype, factor.dtype} == {torch.float64}
    assert abs(u.norm().item() - 1) < 1e-14


def test_decay_spares_what_it_would_harm(model):
    spared = model.no_weight_decay()
    names = {name for name, _ in model.named_parameters()}
    assert spared < names
    assert spared - {n for n in names if n.endswith("relative_position_bias_table")} == {
        "logit_scale",
        "text.token_embedding.weight",
        "text.positional_embedding",
    }


def test_window_change_reaches_the_config(model):
    model.set_input_size(img_size=64, window_size=6)
    assert (model.config.image.img_size, model.config.image.window_size) == (64, 6)
    assert model(torch.randn(1, 3, 64, 64))[0].shape == (1, 12)


def test_towers_are_locked_one_at_a_time(model):
    model.lock_image_tower()
    free = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert free == {"text", "text_projection", "logit_scale"}
    model.lock_text_tower()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["logit_scale"]


def test_checkpointing_reaches_both_towers(model):
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.visual.layers)
    assert model.text.grad_checkpointing


def test_it_learns_to_tell_four_images_apart():
    torch.manual_seed(0)
    model, images, tokens = Florence(FLORENCE).train(), torch.randn(4, 3, 16, 16), texts(4, 5, 6, 7)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        u, v, factor = model(images, tokens)
        loss = torch.nn.functional.cross_entropy(factor * u @ v.T, torch.arange(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2
