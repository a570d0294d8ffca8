"""Other grounds behind drawings on white: the white around a drawing is found, and colours and textures replace it.

The steps are tensor operations on a whole batch. Letters: B batch, H W height and width, S side of a square.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.05  # largest distance from white, in [0, 1], of a ground pixel; lossy files are not exactly white
ROUNDS = 3  # of the flood fill: each goes once in all four directions, round any number of pixels
NO_SPECK = 64  # of 255: without a neighbour of at least this distance from white, a rim pixel is mostly ground
TEXTURES = 384
TEXTURE_SIZE = 96
WHITE_CARD = 0.15  # share of the grounds that have a white card on them
CELLS = ((5, 5), (9, 9), (14, 14), (22, 22), (6, 24), (24, 6), (14, 40), (40, 14))  # rows and columns of blotches
SHAPES = 40  # discs and rectangles that a texture of shapes is painted with, one over another
LARGE_SHAPES = 4  # of the textures that have few


def opacity(images: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Find the drawing on a white ground: 0 where the ground shows, 1 inside the drawing, between them on its rim.

    The ground is what a flood fill from the border reaches through pixels that are almost white; white inside a
    drawing is not reached. A rim pixel is a mixture of the drawing and white. Its share of drawing is its distance
    from white, relative to the largest distance among its neighbours.

    Args:
        images: (B, 3, H, W), floating point in [0, 1].
        tolerance: largest distance from white of a ground pixel.

    Returns:
        (B, 1, H, W), in the dtype of ``images``. With it, ``images + (1 - opacity) * (ground - 1)`` is the drawing
        on another ground.
    """
    distance = ((1 - images.amin(1)) * 255).round_().to(torch.uint8)
    ground = flood_from_border(distance <= round(255 * tolerance))
    rim = _largest_of_neighbours(ground.to(torch.uint8)).bool() & ~ground
    share = distance / _largest_of_neighbours(distance).clamp_(min=NO_SPECK)
    return torch.where(rim, share, ~ground)[:, None].to(images.dtype)


def flood_from_border(passable: Tensor) -> Tensor:
    """Mark the passable pixels that are connected with the border, up to six turns of the way.

    Args:
        passable: (B, H, W), bool.

    Returns:
        (B, H, W), bool.
    """
    count, height, width = passable.shape
    # Eight images to a byte, and the images innermost: each operation below is one pass over little memory.
    bits = torch.arange(8, dtype=torch.uint8, device=passable.device).view(8, 1, 1)
    padded = F.pad(passable.to(torch.uint8), (0, 0, 0, 0, 0, -count % 8)).view(-1, 8, height, width) << bits
    open_HWB = functools.reduce(torch.bitwise_or, padded.unbind(1)).permute(1, 2, 0).contiguous()
    reached = torch.zeros_like(open_HWB)
    for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]):
        edge.fill_(255)
    reached &= open_HWB
    for _ in range(ROUNDS):
        for dim in (0, 1):
            for backwards in (False, True):
                reached = _sweep(reached, open_HWB, dim, backwards)
    unpacked = (reached.permute(2, 0, 1)[:, None] >> bits) & 1
    return unpacked.flatten(0, 1)[:count].bool()


def _sweep(reached: Tensor, passable: Tensor, dim: int, backwards: bool) -> Tensor:
    """Carry ``reached`` one way along ``dim`` through runs of passable pixels, twice as far at every step."""
    size, step = reached.shape[dim], 1
    while step < size:
        length = size - step
        to, origin = (0, step) if backwards else (step, 0)
        moved = reached.narrow(dim, origin, length) & passable.narrow(dim, to, length)
        reached = reached.clone()
        reached.narrow(dim, to, length).bitwise_or_(moved)
        # From here on a pixel is passable if the way of twice as many pixels up to it is.
        both = passable.narrow(dim, origin, length) & passable.narrow(dim, to, length)
        passable = torch.zeros_like(passable)
        passable.narrow(dim, to, length).copy_(both)
        step *= 2
    return reached


def _largest_of_neighbours(x: Tensor) -> Tensor:
    """Largest value of each 3 x 3 neighbourhood of (B, H, W)."""
    for dim in (1, 2):
        length, x, old = x.shape[dim] - 1, x.clone(), x
        for to, origin in ((0, 1), (1, 0)):
            target = x.narrow(dim, to, length)
            torch.maximum(target, old.narrow(dim, origin, length), out=target)
    return x


def draw_grounds(count: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Draw grounds: plain colours, gradients, noise, blotches and heaps of shapes, in random colours.

    Args:
        count: how many, B.
        image_size: side S.
        generator: on the CPU; all randomness comes from it.

    Returns:
        (B, 3, S, S), fp32 in [0, 1], on the CPU.
    """
    bank = textures(max(TEXTURE_SIZE, image_size))
    free = bank.shape[-1] - image_size + 1
    top, left = torch.randint(free, (2,), generator=generator).tolist()
    chosen = torch.randint(len(bank), (count,), generator=generator)
    x = bank[chosen, :, top : top + image_size, left : left + image_size].float().div_(255)
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(-1)
    if torch.rand((), generator=generator) < 0.5:
        x = x.transpose(-1, -2)
    contrast = 1.5 * torch.rand(count, 1, 1, generator=generator)
    contrast[torch.rand(count, 1, 1, generator=generator) < 0.3] = 0  # a plain colour
    mix = contrast * (0.7 * torch.eye(3) + 0.4 * torch.randn(count, 3, 3, generator=generator))
    colour = torch.rand(count, 3, 1, generator=generator)
    grey = torch.rand(count, 1, 1, generator=generator) < 0.15
    colour = torch.where(grey, colour[:, :1], colour)
    ground = torch.baddbmm(colour - 0.5 * mix.sum(-1, keepdim=True), mix, x.flatten(2)).clamp_(0, 1).view_as(x)
    # A white card behind the drawing, turned a little: what is coloured lies around it.
    card = _turned_box(count, image_size, 0.3, (0.65, 1.0), 0.15, generator).amax(0) < 1
    card &= torch.rand(count, 1, 1, generator=generator) < WHITE_CARD
    return ground.masked_fill_(card[:, None], 1)


@functools.lru_cache(maxsize=2)
def textures(size: int, count: int = TEXTURES) -> Tensor:
    """Make the textures that grounds are cut from, always the same: uint8 (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(20)
    part = count // 6
    kinds = [
        _noise(part, size, generator),
        _shapes(part, size, LARGE_SHAPES, (0.3, 0.9), generator),
        _shapes(part, size, SHAPES, (0.05, 0.4), generator),
        _shapes(part, size, 3 * SHAPES, (0.04, 0.15), generator),
        _blotches(part, size, generator),
        _gradients(count - 5 * part, size, generator),
    ]
    return torch.cat(kinds).mul_(255).round_().to(torch.uint8)


def _noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Noise of many scales; how much the fine ones weigh differs from texture to texture."""
    total, weight = torch.zeros(count, 3, size, size), torch.ones(count, 1, 1, 1)
    decay = 0.35 + 0.65 * torch.rand(count, 1, 1, 1, generator=generator)
    cells = 2
    while cells <= size:
        grid = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        total += weight * F.interpolate(grid, size=(size, size), mode="bicubic")
        weight, cells = weight * decay, cells * 2
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (total - low) / (high - low)


def _blotches(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Irregular blotches of two colours, small or large, round or long."""
    images = []
    for number in range(count):
        grid = torch.rand(1, 1, *CELLS[number % len(CELLS)], generator=generator) - 0.5
        which = F.interpolate(grid, size=(size, size), mode="bicubic") > 0.2 * torch.rand((), generator=generator)
        first, second = torch.rand(2, 1, 3, 1, 1, generator=generator)
        images.append(torch.where(which, first, second))
    return torch.cat(images)


def _turned_box(
    count: int, size: int, turn: float, sides: tuple[float, float], away: float, generator: torch.Generator
) -> Tensor:
    """Coordinates (2, count, size, size) along the axes of random boxes, below 1 inside.

    Args:
        count: number of boxes.
        size: of the map.
        turn: largest angle either way, in radians.
        sides: smallest and largest half side; the map reaches from -1 to 1.
        away: largest distance of the centre from that of the map, along each axis.
        generator: source of all draws.
    """
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    place = (torch.rand(count, 2, 1, 1, generator=generator) * 2 - 1) * away
    half = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 2, 1, 1, generator=generator)
    angle = (torch.rand(count, 1, 1, generator=generator) * 2 - 1) * turn
    y, x = rows - place[:, 0], columns - place[:, 1]
    across, along = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return torch.stack([across / half[:, 0], along / half[:, 1]]).abs()


def _shapes(count: int, size: int, shapes: int, sides: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Discs and turned rectangles in random places, each painted over those before: edges as photographs have."""
    image = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    for _ in range(shapes):
        across, along = _turned_box(count, size, torch.pi, sides, 1.2, generator)
        disc = torch.rand(count, 1, 1, generator=generator) < 0.4
        inside = torch.where(disc, across.hypot(along), torch.maximum(across, along)) < 1
        image = torch.where(inside[:, None], torch.rand(count, 3, 1, 1, generator=generator), image)
    return image


def _gradients(count: int, size: int, generator: torch.Generator) -> Tensor:
    """From one colour to another, in a random direction or around a random centre."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    angle = torch.rand(count, 1, 1, generator=generator) * 2 * torch.pi
    place = torch.rand(count, 2, 1, 1, generator=generator) * 2 - 1
    linear = (rows * angle.sin() + columns * angle.cos()) / 2.8 + 0.5
    radial = (rows - place[:, 0]).hypot(columns - place[:, 1]) / 2.8
    share = torch.where(torch.rand(count, 1, 1, generator=generator) < 0.5, linear, radial)[:, None]
    start, end = torch.rand(2, count, 3, 1, 1, generator=generator)
    return torch.lerp(start, end, share)
