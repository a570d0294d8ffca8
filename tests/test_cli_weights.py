"""Weights given as a folder or file say which model they are of, so that --model need not be given with them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import florence_fast as ff
from florence_fast.cli import main
from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.models.factory import model_config, model_of_weights
from florence_fast.models.florence import Florence

CONFIG = FlorenceConfig(
    image=ImageConfig("coswin", 24, (1, 2), (3, 24), img_size=16, window_size=2),
    text=TextConfig(width=16, heads=2, layers=1, context_length=8),
    embed_dim=16,
)
ON_CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two images with captions, and a CSV table of them beside their folder."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    rows = ["filepath,title"]
    for name in ("red", "blue"):
        Image.new("RGB", (20, 12), name).save(folder / f"{name}.png")
        rows.append(f"{folder}/{name}.png,a {name} thing")
    (folder.parent / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(images: Path) -> Path:
    """A run of a model that no name is registered for, started from its saved weights."""
    start = Florence(CONFIG).save_pretrained(images.parent / "start")
    length = ["--steps", "1", "--batch-size", "2", "--image-size", "16", "--workers", "0"]
    where = ["--logs", str(images.parent / "logs"), "--name", "mine"]
    data = str(images.parent / "pairs.csv")
    assert main(["train", "--train-data", data, "--pretrained", str(start), *length, *where, *ON_CPU]) == 0
    return images.parent / "logs" / "mine"


def test_commands_take_the_model_of_the_weights(run: Path, images: Path, tmp_path: Path, capsys) -> None:
    weights = ["--pretrained", str(run), *ON_CPU]
    table = str(images.parent / "pairs.csv")
    picture = str(images / "red.png")
    assert main(["predict", "--image", picture, "--texts", "a", "b", *weights]) == 0
    assert main(["search", "--images", str(images), "--query", "red", "--out", str(tmp_path), *weights]) == 0
    for task in ("zero-shot", "retrieval"):
        assert main(["evaluate", task, "--data", table, *weights]) == 0
    capsys.readouterr()
    assert main(["predict", "--image", picture, *weights]) == 2
    assert "--texts is needed" in capsys.readouterr().err
    assert main(["predict", "--image", picture, "--texts", "a", "--model", "florence_tiny", *weights]) == 2
    assert "another model than florence_tiny" in capsys.readouterr().err


def test_a_run_is_a_model_by_its_bare_name_too(run: Path, monkeypatch) -> None:
    monkeypatch.chdir(run.parent)
    assert ff.create_model("mine").config == model_config("mine") == CONFIG
    assert ff.get_tokenizer("mine")(["a"]).shape == (1, CONFIG.text.context_length)
    (run.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="unknown model 'empty'"):
        ff.create_model("empty")


def test_weights_that_state_no_model_are_those_of_the_default(images: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "plain.pth"
    torch.save(ff.create_model("florence_nano").state_dict(), file)
    assert [model_of_weights(weights) for weights in (None, "none", "artists", "nowhere", file)] == [None] * 5
    asked = ["predict", "--image", str(images / "red.png"), "--texts", "a", *ON_CPU, "--pretrained"]
    assert main([*asked, str(file)]) == 0
    torch.save(Florence(CONFIG).state_dict(), file)
    assert main([*asked, str(file)]) == 2
    assert "plain.pth" in capsys.readouterr().err
