"""Augmentation of a whole batch at once, on the batch's device.

One affine map and one colour map an image, a handful of tensor operations a batch: on two CPU cores this
costs a few per cent of the training step, where image-by-image augmentation would cost more than the
model. Letters: B batch, S side of the square output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.data.grounds import draw_grounds, opacity

HARD_RIM = 0.2  # share of the replaced grounds that leave the drawing's rim mixed with white


@dataclass(frozen=True)
class BatchAugment:
    """Random affine and colour changes, then normalisation: uint8 images in, float tensors out.

    Every draw comes from a generator seeded by (``seed``, ``step``), so a resumed run sees the same images.
    The region outside a turned or shrunk image is white, or its ground. A strength of 0 switches its change off, and
    with all of them at 0 the result is only resized and normalised.

    Args:
        mean: channel means subtracted, in [0, 1].
        std: channel deviations divided by.
        degrees: largest rotation either way.
        scale: largest change of size either way, as a natural logarithm (0.25: 0.78 to 1.28 times).
        aspect: the same for width against height.
        shear: largest horizontal shear, as a slope.
        translate: largest shift either way, as a share of half the image.
        colour: standard deviation of the random mixing of the three channels.
        grey: probability of a grey image.
        contrast: largest change of contrast either way, as a natural logarithm.
        brightness: largest shift of brightness either way, in [0, 1].
        grounds: probability that the white around a drawing is replaced; see `draw_grounds`.
    """

    mean: Sequence[float]
    std: Sequence[float]
    degrees: float = 15.0
    scale: float = 0.25
    aspect: float = 0.15
    shear: float = 0.15
    translate: float = 0.12
    colour: float = 0.12
    grey: float = 0.1
    contrast: float = 0.4
    brightness: float = 0.15
    grounds: float = 0.0

    def strengthened(self, factor: float) -> "BatchAugment":
        """Return the same with every strength multiplied by ``factor``, ``grounds`` aside.

        A factor of 0 leaves resizing and normalisation alone, and the grounds.
        """
        strengths = [field.name for field in fields(self) if field.name not in ("mean", "std", "grounds")]
        return replace(self, **{name: factor * getattr(self, name) for name in strengths})

    def __call__(self, images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        """Augment one batch.

        Args:
            images: (B, 3, H, W), uint8.
            image_size: side S of the output, in pixels.
            seed: the run's seed.
            step: number of the step, the second part of the key.

        Returns:
            (B, 3, S, S), fp32, normalised.

        Raises:
            ValueError: ``images`` is not (B, 3, H, W) in uint8.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 of shape (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}"
            )
        # Drawn on the CPU: the same numbers whatever the device.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        x = images.float().div_(255)
        if x.shape[-2:] != (image_size, image_size):
            # Averaged down before it is turned: bilinear sampling alone would skip pixels.
            x = F.interpolate(x, size=(image_size, image_size), mode="area")
        x = self._recolour(self._place(x, generator), generator)
        mean = torch.tensor(self.mean, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(3, 1, 1)
        return (x - mean) / std

    def _place(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Turn, scale, shear and shift each image by its own affine map, and give some another ground."""
        grid = self._grid(x, generator)
        # grid_sample fills with zeros; on the negative that is white.
        moved = 1 - F.grid_sample(1 - x, grid, align_corners=False)
        if not self.grounds:
            return moved
        chosen = (torch.rand(len(x), generator=generator) < self.grounds).nonzero()[:, 0]
        # Some keep a white rim, as drawings have that people cut out.
        hard = torch.rand(len(chosen), 1, 1, 1, generator=generator) < HARD_RIM
        ground = draw_grounds(len(chosen), x.shape[-1], generator).to(x.device)
        chosen = chosen.to(x.device)
        share = F.grid_sample(opacity(x[chosen]), grid[chosen], align_corners=False)
        share = torch.where(hard.to(x.device) & (share > 0), 1, share)
        moved[chosen] += (1 - share) * (ground - 1)
        return moved

    def _grid(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw an affine map for each image, and return the places (B, H, W, 2) that its pixels come from."""

        def uniform(bound: float) -> Tensor:
            return (torch.rand(len(x), generator=generator, device="cpu") * 2 - 1) * bound

        angle = uniform(math.radians(self.degrees))
        width = uniform(self.scale).exp()
        height = width * uniform(self.aspect).exp()
        cos, sin, shear = angle.cos(), angle.sin(), uniform(self.shear)
        rows = [cos * width, shear - sin * height, uniform(self.translate)]
        rows += [sin * width, cos * height, uniform(self.translate)]
        theta = torch.stack(rows, 1).view(-1, 2, 3).to(x.device)
        return F.affine_grid(theta, list(x.shape), align_corners=False)

    def _recolour(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Mix the channels near the identity, some to grey, then change contrast and brightness."""
        count = len(x)
        mix = torch.eye(3, device="cpu") + torch.randn(count, 3, 3, generator=generator, device="cpu") * self.colour
        # Rows that sum to one leave white white: the background carries no colour cast.
        mix = mix / mix.sum(-1, keepdim=True)
        grey = torch.rand(count, 1, 1, generator=generator, device="cpu") < self.grey
        mix = torch.where(grey, torch.full_like(mix, 1 / 3), mix)
        gain = ((torch.rand(count, 1, 1, generator=generator, device="cpu") * 2 - 1) * self.contrast).exp()
        shift = (
            0.5 - 0.5 * gain + (torch.rand(count, 1, 1, generator=generator, device="cpu") * 2 - 1) * self.brightness
        )
        mixed = torch.baddbmm(shift.to(x.device), (mix * gain).to(x.device), x.flatten(2))
        return mixed.clamp_(0, 1).view_as(x)
