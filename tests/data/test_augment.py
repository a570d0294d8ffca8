"""BatchAugment: keyed draws, identity at strength zero, white outside, one clear error for a wrong batch."""

import pytest
import torch

from florence_fast.data.augment import BatchAugment


def without_changes(mean, std) -> BatchAugment:
    return BatchAugment(mean=mean, std=std).strengthened(0)


def images(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_same_key_gives_the_same_images_and_another_step_others():
    augment = BatchAugment(mean=(0.5,) * 3, std=(0.25,) * 3)
    first, again = augment(images(), 16, seed=3, step=7), augment(images(), 16, seed=3, step=7)
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images(), 16, seed=3, step=8))
    assert not torch.equal(first, augment(images(), 16, seed=4, step=7))


def test_with_every_strength_at_zero_only_the_normalisation_is_left():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    out = without_changes(mean, std)(images(), 16, seed=0, step=0)
    expected = (images().float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_white_image_stays_white_under_every_geometric_and_channel_change():
    white = torch.full((8, 3, 12, 12), 255, dtype=torch.uint8)
    augment = BatchAugment(mean=(0.0,) * 3, std=(1.0,) * 3, contrast=0.0, brightness=0.0, degrees=45, colour=0.3)
    torch.testing.assert_close(augment(white, 12, seed=0, step=0), torch.ones(8, 3, 12, 12), atol=1e-5, rtol=0)


def test_a_smaller_size_averages_blocks():
    out = without_changes((0.0,) * 3, (1.0,) * 3)(images(2, 16), 8, seed=0, step=0)
    expected = (images(2, 16).float() / 255).view(2, 3, 8, 2, 8, 2).mean((3, 5))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_every_image_gets_its_own_change():
    same = images(1).expand(4, -1, -1, -1)
    out = BatchAugment(mean=(0.5,) * 3, std=(0.25,) * 3)(same, 16, seed=0, step=0)
    assert all(not torch.equal(out[0], other) for other in out[1:])


def test_strengthened_multiplies_every_strength_and_nothing_else():
    plain = BatchAugment(mean=(0.5,) * 3, std=(0.25,) * 3)
    strong = plain.strengthened(2)
    assert (strong.mean, strong.std) == (plain.mean, plain.std)
    assert strong.degrees == 2 * plain.degrees and strong.brightness == 2 * plain.brightness and strong.grey == 0.2


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_a_wrong_batch_is_refused_by_shape_and_type(bad):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(B, 3, H, W\), got"):
        BatchAugment(mean=(0.5,) * 3, std=(0.25,) * 3)(bad, 8, seed=0, step=0)
