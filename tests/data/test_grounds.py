"""White grounds: what a flood fill reaches, the rim of a drawing, and grounds drawn from a generator."""

import pytest
import torch

from florence_fast.data.augment import BatchAugment
from florence_fast.data.grounds import draw_grounds, flood_from_border, opacity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(size: int = 64, radius: float = 20.0) -> torch.Tensor:
    """Share of each pixel that a disc covers, (1, 1, size, size), by 8 x 8 points a pixel."""
    points = (torch.arange(8 * size) + 0.5) / 8 - size / 2
    covered = (points[:, None].hypot(points) < radius).float()
    return torch.nn.functional.avg_pool2d(covered[None, None], 8)


def fill_by_definition(passable: torch.Tensor) -> torch.Tensor:
    height, width = passable.shape
    reached = torch.zeros_like(passable)
    todo = [(y, x) for y in range(height) for x in range(width) if y in (0, height - 1) or x in (0, width - 1)]
    while todo:
        y, x = todo.pop()
        if 0 <= y < height and 0 <= x < width and passable[y, x] and not reached[y, x]:
            reached[y, x] = True
            todo += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return reached


@pytest.mark.parametrize("shape", [(5, 24, 24), (8, 17, 40), (11, 40, 9), (1, 1, 1), (3, 1, 7)])
def test_the_flood_fill_is_that_of_the_definition(shape):
    passable = torch.rand(shape, generator=generator()) < 0.85
    expected = torch.stack([fill_by_definition(image) for image in passable])
    assert torch.equal(flood_from_border(passable), expected)


def test_the_flood_goes_round_corners_but_not_through_walls():
    walls = torch.zeros(1, 32, 32, dtype=torch.bool)
    walls[0, 8:24, 8] = walls[0, 8:24, 23] = walls[0, 8, 8:24] = walls[0, 23, 8:24] = True
    closed, opened = walls.clone(), walls.clone()
    opened[0, 23, 20] = False
    assert not flood_from_border(~closed)[0, 9:23, 9:23].any()
    assert flood_from_border(~opened)[0, 9:23, 9:23].all()


def test_the_opacity_of_a_disc_is_its_coverage():
    share = disc()
    colour = torch.tensor([0.8, 0.1, 0.2]).view(1, 3, 1, 1)
    found = opacity(share * colour + (1 - share))
    assert (found - share).abs().max() < 0.1 and (found - share).abs().mean() < 1e-3


def test_a_drawing_on_another_ground_is_what_drawing_it_there_gives():
    share, ground = disc(), draw_grounds(1, 64, generator())
    colour = torch.tensor([0.1, 0.3, 0.9]).view(1, 3, 1, 1)
    on_white = share * colour + (1 - share)
    moved = on_white + (1 - opacity(on_white)) * (ground - 1)
    assert (moved - (share * colour + (1 - share) * ground)).abs().max() < 0.1


def test_white_inside_a_drawing_stays():
    share = disc(radius=25) - disc(radius=12)
    image = 1 - share.expand(-1, 3, -1, -1)
    found = opacity(image)
    assert found[0, 0, 32, 32] == 1 and found[0, 0, 2, 2] == 0


def test_almost_white_specks_of_a_lossy_file_are_ground():
    image = torch.ones(1, 3, 32, 32)
    image[0, :, 10, 10] = 0.93
    assert opacity(image).max() < 0.35


def test_grounds_follow_from_the_generator_and_lie_in_range():
    first, again, other = (draw_grounds(40, 32, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (40, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    spread = first.flatten(2).std(-1).amax(1)
    assert 4 <= (spread < 1e-6).sum() <= 24, "some are plain colours, some are not"


def test_augmentation_replaces_the_share_of_grounds_that_it_was_asked_for():
    white = torch.full((400, 3, 16, 16), 255, dtype=torch.uint8)
    augment = BatchAugment(mean=(0.0,) * 3, std=(1.0,) * 3, grounds=0.6).strengthened(0)
    changed = (augment(white, 16, seed=0, step=0) < 0.99).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 0.7


def test_augmentation_keeps_the_drawing_and_its_draws_are_keyed():
    images = (255 * (1 - disc().expand(9, 3, -1, -1))).to(torch.uint8)
    augment = BatchAugment(mean=(0.0,) * 3, std=(1.0,) * 3, grounds=1.0).strengthened(0)
    out = augment(images, 64, seed=1, step=2)
    assert out[:, :, 24:40, 24:40].abs().max() < 1e-5
    assert torch.equal(out, augment(images, 64, seed=1, step=2))
    assert not torch.equal(out, augment(images, 64, seed=1, step=3))
