"""Evaluators of training: open_clip's keys, and the classes that compete."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from florence_fast.data.pairs import open_pairs
from florence_fast.data.prompts import IMAGENET_WNIDS
from florence_fast.evaluate import evaluator
from florence_fast.evaluate.evaluator import RetrievalEvaluator, ZeroShotEvaluator
from florence_fast.models import Florence
from tests.models.tiny import FLORENCE

COLOURS = {"red": (250, 0, 0), "sea_green": (0, 250, 0), "blue": (0, 0, 250)}


class Colours(nn.Module):
    """Features of an image are its mean colour; those of a text, the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = Florence(FLORENCE).config

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(image.mean((2, 3)) - image.mean((1, 2, 3))[:, None], dim=-1)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(text, dim=-1)


def tokenizer(texts: list[str]) -> Tensor:
    named = [[float(word in text) for word in ("red", "sea green", "blue")] for text in texts]
    return torch.tensor(named) - 0.3 + 1e-3


def _write(folder: Path, names: dict[str, str]) -> Path:
    for name, colour in names.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), COLOURS[colour]).save(folder / name / "0.png")
    return folder


def test_zero_shot_on_folders_with_names(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"red": "red", "sea_green": "sea_green", "blue": "red"})  # blue's image is red
    found = ZeroShotEvaluator(tokenizer, folder, ["a photo of {}."]).run(Colours())
    assert found["imagenet-zeroshot-val-top1"] == pytest.approx(2 / 3)
    assert found["imagenet-zeroshot-val-mean-per-class"] == pytest.approx(2 / 3)


def test_wordnet_ids_compete_with_all_of_imagenet(tmp_path: Path) -> None:
    folder = _write(tmp_path, dict.fromkeys(IMAGENET_WNIDS[3:5], "red"))
    made = ZeroShotEvaluator(tokenizer, folder)
    assert len(made.names) == 1000 and made.source.labels == [3, 4] and len(made.templates) == 80
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        ZeroShotEvaluator(tokenizer, tmp_path / "gone")


def test_retrieval_has_open_clips_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"image_to_text": {"r1": 0.1, "r5": 0.2, "r10": 0.3}, "text_to_image": {"r1": 0.4, "r5": 0.5, "r10": 0.6}}
    monkeypatch.setattr(evaluator, "retrieval", lambda *_: {**shares, "images": 3, "texts": 2})
    source = open_pairs(_write(tmp_path, {"red": "red", "blue": "blue"}))
    found = RetrievalEvaluator(tokenizer, source).run(Colours())
    assert found["image_to_text_R@1"] == 0.1 and found["text_to_image_R@10"] == 0.6 and len(found) == 6
