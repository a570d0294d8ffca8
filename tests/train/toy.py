"""A dual encoder of two layers a tower, its data and its gradients: what the tests of the loss share.

Letters: B pairs · D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_DIM, TEXT_DIM = 6, 5


class Tower(nn.Sequential):
    """Two layers; the second is skipped for a random share of the samples, as drop path does it."""

    def __init__(self, in_features: int, drop_path: float) -> None:
        super().__init__(nn.Linear(in_features, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = self[1](self[0](x))
        kept = torch.rand(len(x), 1, device=x.device) >= self.drop_path
        return F.normalize(x + self[2](x) * kept, dim=-1)


class TwoTowers(nn.Module):
    """The interface of Florence, float64, with the same parameters at every construction."""

    def __init__(self, drop_path: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.visual = Tower(IMAGE_DIM, drop_path)
            self.text = Tower(TEXT_DIM, drop_path)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.calls: list[tuple[int, int]] = []
        self.to(dtype)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        self.calls.append(tuple(0 if x is None else len(x) for x in (image, text)))
        images = None if image is None else self.visual(image)
        texts = None if text is None else self.text(text)
        return images, texts, self.logit_scale.exp()


def batch(pairs: int, distinct: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, texts and labels; pairs of one label have one text."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(distinct, (pairs,), generator=generator)
    texts = torch.randn(distinct, TEXT_DIM, dtype=torch.float64, generator=generator)[labels]
    return torch.randn(pairs, IMAGE_DIM, dtype=torch.float64, generator=generator), texts, labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Compare values, after making sure that there is something to compare."""
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.abs().max() > 1e-3, f"the gradient of {name} is too small to tell anything"
        torch.testing.assert_close(
            got[name], grad, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
