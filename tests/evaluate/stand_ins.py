"""Stand-ins for evaluation tests: images of one colour, and a model whose features are colours."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor, nn

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


def tokenizer(texts: str | list[str]) -> Tensor:
    """One token a text: the number of the first colour that it names, or 99."""
    texts = [texts] if isinstance(texts, str) else texts
    names = list(COLOURS)
    return torch.tensor([[next((names.index(name) for name in names if name in text), 99)] for text in texts])


def transform(image: Image.Image) -> Tensor:
    """The image's first pixel as a (3, 1, 1) tensor from 0 to 1."""
    return torch.tensor(image.getpixel((0, 0))).float().view(3, 1, 1) / 255


class ColourModel(nn.Module):
    """A dual encoder that is always right: an image's feature is its colour, a text's the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        self.modes.append(self.training)
        features = image.flatten(1) * self.gain
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        table = torch.tensor(list(COLOURS.values())).float() / 255
        features = table[text[:, 0]] * self.gain
        return nn.functional.normalize(features, dim=-1) if normalize else features


@dataclass
class ColourImages:
    """A source of one-coloured images; a text may be given apart from the colour, None is a broken image."""

    colours: list[str | None]
    captions: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.colours)

    def texts(self, index: int) -> SimpleNamespace:
        text = (self.captions or self.colours)[index]
        if not text:
            raise ValueError("its text is empty")
        return SimpleNamespace(text=text, short_name=None, keywords=[])

    def image(self, index: int) -> Image.Image:
        if self.colours[index] is None:
            raise OSError("broken data stream when reading image file")
        return Image.new("RGB", (2, 2), COLOURS[self.colours[index]])

    def describe(self, index: int) -> str:
        return f"image {index}"
