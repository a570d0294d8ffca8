"""Top-1, top-5 and the mean per class, from logits that are known."""

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from florence_fast.evaluate.classification import class_probabilities, classification


class Labelled:
    """Images whose colour is their number; one may be broken."""

    classes = tuple("abcdefg")
    labels = (0, 0, 0, 1, 2, 2)

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        if index == self.broken:
            raise ValueError("cut off")
        return Image.new("RGB", (2, 2), (index, 0, 0))

    def describe(self, index: int) -> str:
        return f"image {index}"


class Table(nn.Module):
    """Logits of image i are row i of a table."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def transform(image: Image.Image) -> Tensor:
    return torch.full((3, 2, 2), float(image.getpixel((0, 0))[0]))


def test_figures() -> None:
    logits = torch.zeros(6, 7)
    for row, answer in enumerate((0, 0, 1, 1, 3, 3)):  # right: 2 of 3, 1 of 1, 0 of 2
        logits[row] = torch.arange(7.0)
        logits[row, answer] = 9
    found = classification(Table(logits), Labelled(), transform, batch_size=4, precision="fp32")
    assert found["top1"] == pytest.approx(3 / 6) and (found["classes"], found["images"]) == (7, 6)
    assert found["mean_per_class"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    # behind the answer the order is 6, 5, 4 and so on: 0 is not among the first five of row 2, 2 is of rows 4 and 5
    assert found["top5"] == pytest.approx(5 / 6)
    found = classification(Table(logits), Labelled(broken=3), transform, precision="fp32", max_bad_share=0.2)
    assert found["images"] == 5 and found["mean_per_class"] == pytest.approx((2 / 3 + 0) / 2)


def test_probabilities_of_one_image() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    found = class_probabilities(Table(logits), Image.new("RGB", (2, 2)), transform, precision="fp32")
    assert found == pytest.approx(logits[0].softmax(0).tolist())
