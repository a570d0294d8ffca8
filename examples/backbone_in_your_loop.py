"""Use an image tower as the backbone of a network of your own, in a training loop of your own.

    python examples/backbone_in_your_loop.py

The network finds a bright square in a noisy image: feature maps of two stages, a small head, plain PyTorch around it.
"""

import argparse

import torch
from torch import Tensor, nn

import florence_fast as ff


class SquareFinder(nn.Module):
    """Feature maps of strides 8 and 16, and one logit for each cell of stride 8: is the square's centre here?"""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ff.create_model("coswin_nano", features_only=True, out_indices=(1, 2))
        fine, coarse = self.backbone.feature_info.channels()
        self.fine, self.coarse = nn.Conv2d(fine, 32, 1), nn.Conv2d(coarse, 32, 1)
        self.head = nn.Sequential(nn.GELU(), nn.Conv2d(32, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, H/8 * W/8)."""
        fine, coarse = self.backbone(images)
        joined = self.fine(fine) + nn.functional.interpolate(self.coarse(coarse), size=fine.shape[-2:])
        return self.head(joined).flatten(1)


def draw(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with one brighter square of 8 pixels; returns the images and the cell that holds each square."""
    images = torch.randn(count, 3, size, size, generator=generator)
    cells = size // 8
    target = torch.randint(cells * cells, (count,), generator=generator)
    for image, cell in zip(images, target.tolist(), strict=True):
        top, left = 8 * (cell // cells), 8 * (cell % cells)
        image[:, top : top + 8, left : left + 8] += 1.5
    return images, target


def main() -> None:
    """Train, and print how often the square is found in new images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = SquareFinder()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(args.steps):
        images, target = draw(32, args.size, generator)
        loss = nn.functional.cross_entropy(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    network.eval()
    with torch.no_grad():
        images, target = draw(256, args.size, generator)
        found = (network(images).argmax(1) == target).float().mean().item()
    print(f"found the square in {found:.1%} of 256 new images")


if __name__ == "__main__":
    main()
