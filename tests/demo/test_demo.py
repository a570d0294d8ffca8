"""The whole demo on a few dozen real pictures: every file it promises, and figures that agree with each other."""

import json

import numpy as np
import pytest
from PIL import Image

from florence_fast import demo
from florence_fast.data.artists import artists_test, artists_train
from florence_fast.data.pairs import PairText, Subset
from florence_fast.demo import curves, sheets


@pytest.fixture
def few_pictures(monkeypatch):
    """Forty test pictures and the training pictures of the same names."""
    test = Subset(artists_test(), range(0, 1600, 40))
    known = {test.texts(index).text for index in range(len(test))}
    whole = artists_train()
    train = Subset(whole, [index for index in range(len(whole)) if whole.texts(index).text in known])
    monkeypatch.setattr(demo, "artists_train", lambda: train)
    monkeypatch.setattr(demo, "artists_names", lambda: sorted(known))
    for module in (demo, sheets):
        monkeypatch.setattr(module, "artists_test", lambda: test)
    return test


@pytest.fixture
def rehearsed(few_pictures, tmp_path):
    return demo.run(tmp_path / "demo", steps=3), tmp_path / "demo"


def test_a_rehearsal_writes_everything_that_it_promises(rehearsed):
    results, out = rehearsed
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("curves", "queries", "readings"):
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert picture.std() > 5, f"{name}.png is blank"
    assert (out / "model" / "model.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert 'src="http' not in page and f"{results['zero_shot']['top1']:.1%}" in page


def test_the_figures_are_fractions_of_the_right_pools(rehearsed):
    results, _ = rehearsed
    found, recalls = results["zero_shot"], results["retrieval"]
    assert (found["classes"], found["images"]) == (40, 40)
    assert 0 <= found["top1"] <= found["top5"] <= found["top10"] <= 1
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= recalls[direction]["r1"] <= recalls[direction]["r5"] <= recalls[direction]["r10"] <= 1
    assert results["steps"] == 3 and results["images_per_second"] > 0 and results["seconds"] > 0


def test_an_earlier_run_is_not_overwritten(rehearsed):
    _, out = rehearsed
    with pytest.raises(FileExistsError, match="holds a run already"):
        demo.run(out, steps=3)


def test_right_pictures_are_those_that_unicode_calls_so():
    apple = PairText("red apple", "red apple", ["fruit", "red"])
    assert sheets.describes("Fruit", apple) and sheets.describes("red apple", apple)
    assert not sheets.describes("apple", apple)


def test_curves_are_drawn_for_a_run_that_changes_its_size(tmp_path):
    history = [{"seconds": s, "loss": 6 - s / 10} for s in range(4)]
    history += [{"seconds": s, "top1": s / 10, "top5": s / 5, "image_size": 32 if s < 2 else 64} for s in range(4)]
    curves.draw_curves(tmp_path / "curves.png", history)
    assert Image.open(tmp_path / "curves.png").size == (1200, 432)
