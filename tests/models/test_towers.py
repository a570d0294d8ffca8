"""Image towers: sizes, feature lists, windows, classifiers, checkpointing and drop path, on the smallest that exist."""

import dataclasses

import pytest
import torch

from florence_fast.models import FeatureExtractor
from florence_fast.models.florence import build_tower
from florence_fast.models.layers import add_branch, drop_path_rates, resize_bias_table
from tests.models.tiny import COSWIN, SWIN

KINDS = pytest.mark.parametrize("config", [COSWIN, SWIN], ids=["coswin", "swin"])


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)])


@KINDS
@pytest.mark.parametrize("size", [(32, 32), (37, 50), (16, 64), (5, 9), (4, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_image_size_is_taken_and_every_parameter_is_used(config, size):
    tower = build_tower(config)
    out = tower(torch.randn(2, 3, *size))
    assert out.shape == (2, 16)
    grads = torch.autograd.grad(out.square().sum(), list(tower.parameters()), allow_unused=True)
    unused = [name for (name, _), g in zip(tower.named_parameters(), grads, strict=True) if g is None]
    assert unused == []


@KINDS
def test_a_batch_is_its_samples(config):
    tower, images = build_tower(config).eval(), torch.randn(3, 3, 36, 28)
    one_by_one = torch.cat([tower(image[None]) for image in images])
    torch.testing.assert_close(tower(images), one_by_one, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_is_encoded_to_nothing():
    assert build_tower(COSWIN)(torch.empty(0, 3, 32, 32)).shape == (0, 16)


@KINDS
def test_features_are_what_the_stages_hold(config):
    tower, image = build_tower(config).eval(), torch.randn(2, 3, 32, 48)
    final, maps = tower.forward_intermediates(image)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 12), (2, 16, 4, 6)]
    assert tower.feature_info.channels() == [8, 16]
    assert tower.feature_info.reduction() == [4, 8]
    assert torch.equal(final, tower.forward_features(image))
    torch.testing.assert_close(final, tower.norm(maps[1].permute(0, 2, 3, 1)))
    assert torch.equal(tower.forward_head(final), tower(image))
    (last,) = tower.forward_intermediates(image, 1, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last, final)


def test_stopping_early_runs_no_later_stage():
    tower, ran = build_tower(COSWIN), []
    tower.layers[1].register_forward_hook(lambda *_: ran.append(1))
    tower.forward_intermediates(torch.randn(1, 3, 32, 32), (0,), stop_early=True)
    assert not ran
    tower.forward_intermediates(torch.randn(1, 3, 32, 32), (0,))
    assert ran


@KINDS
def test_features_only_drops_what_nobody_reads(config):
    tower, image = build_tower(config).eval(), torch.randn(1, 3, 32, 32)
    expected = tower.forward_intermediates(image, intermediates_only=True)
    first = FeatureExtractor(build_tower(config), out_indices=(0,), output_fmt="NHWC").eval()
    first.tower.load_state_dict(tower.state_dict(), strict=False)
    (shown,) = first(image)
    assert torch.equal(shown, expected[0].permute(0, 2, 3, 1))
    assert (first.feature_info.channels(), first.feature_info.reduction()) == ([8], [4])
    names = {name.split(".")[1] for name, _ in first.named_parameters()}
    assert names == {"patch_embed", "layers"}
    assert not any("downsample" in name for name, _ in first.named_parameters())
    assert all(g is not None for g in torch.autograd.grad(shown.sum(), list(first.parameters()), allow_unused=True))
    both = FeatureExtractor(tower)
    for ours, theirs in zip(both(image), expected, strict=True):
        assert torch.equal(ours, theirs)
    both.set_grad_checkpointing()
    assert len(both.no_weight_decay()) == 4


@pytest.mark.parametrize("indices", [(2,), (-3,), (), 0])
def test_a_stage_that_is_not_there_is_refused(indices):
    with pytest.raises(ValueError, match="stages from -2 to 1"):
        build_tower(COSWIN).forward_intermediates(torch.randn(1, 3, 32, 32), indices)


def test_bad_images_and_formats_are_refused():
    tower = build_tower(COSWIN)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        tower(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"at least 4 pixels wide and high, got \(1, 3, 8, 3\)"):
        tower(torch.randn(1, 3, 8, 3))
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch\.uint8"):
        tower(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC', got 'CHWN'"):
        tower.forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="CHWN")
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC', got 'CHWN'"):
        FeatureExtractor(tower, output_fmt="CHWN")


def test_classifier_comes_and_goes():
    tower = build_tower(dataclasses.replace(COSWIN, num_classes=5))
    image = torch.randn(2, 3, 32, 32)
    assert tower(image).shape == (2, 5)
    assert tower.get_classifier().out_features == 5
    tower.reset_classifier(3)
    assert (tower(image).shape, tower.config.num_classes) == ((2, 3), 3)
    tower.reset_classifier(0)
    assert tower(image).shape == (2, 16)


def test_window_change_resizes_tables_and_keeps_small_maps_close():
    torch.manual_seed(1)
    tower, image = build_tower(COSWIN).eval(), torch.randn(1, 3, 64, 64)
    before = tower.forward_features(image)
    tower.set_input_size(img_size=48, window_size=6)
    assert (tower.config.img_size, tower.config.window_size) == (48, 6)
    assert all(block.attn.relative_position_bias_table.shape[0] == 121 for s in tower.layers for block in s.blocks)
    assert not torch.equal(tower.forward_features(image), before)
    tower.set_input_size(window_size=6)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in tower.parameters())


def test_bias_tables_are_resized_as_a_smooth_field():
    y, x = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-6.0, 7), indexing="ij")
    table = torch.stack([(2 * y + x).flatten(), (y - x).flatten()], 1)  # (169, 2), linear in the offset
    larger = resize_bias_table(table, (12, 12)).view(23, 23, 2)
    y, x = (13 / 23 * axis for axis in torch.meshgrid(torch.arange(-11.0, 12), torch.arange(-11.0, 12), indexing="ij"))
    expected = torch.stack([2 * y + x, y - x], 2)
    inner = slice(3, -3)
    torch.testing.assert_close(larger[inner, inner], expected[inner, inner], rtol=0, atol=0.2)
    torch.testing.assert_close(larger[11, 11], torch.zeros(2))
    assert resize_bias_table(table, (7, 7)) is table
    assert resize_bias_table(table, (3, 5)).shape == (45, 2)
    with pytest.raises(ValueError, match=r"\(2w-1\)\*\*2 rows, got \(170, 2\)"):
        resize_bias_table(torch.zeros(170, 2), (7, 7))


@KINDS
def test_checkpointing_changes_no_gradient_even_under_drop_path(config):
    tower = build_tower(dataclasses.replace(config, drop_path_rate=0.5)).train()
    image = torch.randn(4, 3, 32, 32)
    found = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        found.append(gradients(tower, tower(image).square().sum()))
    assert torch.equal(*found)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x, branch = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    out = add_branch(x, branch, 0.25, training=True)
    assert torch.equal(out, out[:, :1, :1].expand_as(out)), "a sample is dropped or kept whole"
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(add_branch(x, branch, 0.25, training=False), branch)


def test_drop_path_draws_once_a_branch_and_never_at_rate_zero():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_tower(COSWIN)  # draws weights
    torch.set_rng_state(before)
    add_branch(torch.zeros(8, 1), torch.ones(8, 1), 0.0, training=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_path_rates_rise_linearly():
    assert drop_path_rates((1, 3, 1), 0.4) == [[0.0], pytest.approx([0.1, 0.2, 0.3]), [0.4]]
    assert drop_path_rates((1,), 0.4) == [[0.0]]


def test_decay_spares_the_bias_tables():
    tower = build_tower(COSWIN)
    assert tower.no_weight_decay() == {
        f"layers.{s}.blocks.{b}.attn.relative_position_bias_table" for s in (0, 1) for b in (0, 1)
    }
    assert set(tower.group_matcher()) == {"stem", "blocks"}


def test_second_block_of_a_stage_sees_across_windows():
    tower = build_tower(dataclasses.replace(COSWIN, depths=(1,), num_heads=(1,))).eval()
    deeper = build_tower(dataclasses.replace(COSWIN, depths=(2,), num_heads=(1,))).eval()
    for model, sees in ((tower, False), (deeper, True)):
        image = torch.randn(1, 3, 32, 32, requires_grad=True)
        corner = model.forward_features(image)[0, 3, 3].square().sum()
        (seen,) = torch.autograd.grad(corner, image)
        assert bool(seen[..., 17:].any()) is sees, "token 3 of the first window of 4 ends at pixel 16"


def test_coswin_leaves_pads_out_of_sight():
    attention = build_tower(COSWIN).layers[0].blocks[0].attn
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(1, 5, 5, 8)  # the last token stands alone in its window of 4: it sees itself
    alone = attention.proj(attention.qkv(x)[..., 16:])
    torch.testing.assert_close(attention(x)[0, 4, 4], alone[0, 4, 4])
    assert not torch.allclose(attention(x)[0, 3, 3], alone[0, 3, 3])


def test_a_tower_compiles_without_a_break():
    tower = build_tower(dataclasses.replace(COSWIN, depths=(2,), num_heads=(1,))).eval()
    image = torch.randn(2, 3, 36, 40)
    compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), tower(image), rtol=1e-5, atol=1e-5)
