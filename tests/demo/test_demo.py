"""The whole demo on a few dozen real pictures: every file it promises, and figures that agree with each other."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from florence_fast import demo
from florence_fast.data.artists import artists_test, artists_train
from florence_fast.data.pairs import PairText, Subset
from florence_fast.demo import curves, grounds, sheets, shipped
from florence_fast.demo.recipe import Recipe
from florence_fast.train.config import Stage


@pytest.fixture
def few_pictures(monkeypatch):
    """Forty test pictures and the training pictures of the same names."""
    test = Subset(artists_test(), range(0, 1600, 40))
    known = {test.texts(index).text for index in range(len(test))}
    whole = artists_train()
    train = Subset(whole, [index for index in range(len(whole)) if whole.texts(index).text in known])
    monkeypatch.setattr(demo, "artists_train", lambda: train)
    for module in (demo, shipped):
        monkeypatch.setattr(module, "artists_names", lambda: sorted(known))
    for module in (demo, sheets, shipped, grounds):
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


def test_it_says_first_what_the_shipped_weights_read(few_pictures, tmp_path, capsys):
    results = demo.run(tmp_path / "demo", steps=3)
    printed = capsys.readouterr().out
    assert printed.index("The shipped weights") < printed.index("an artist never seen")
    assert f"{results['shipped']['zero_shot']['top1']:.1%} of 40" in printed
    assert results["shipped"]["grounds"].keys() == results["grounds"].keys() == {"white", "mean", *grounds.GROUNDS}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert f"{results['grounds']['mean']:.0%}" in page and f"{results['shipped']['zero_shot']['top1']:.1%}" in page


def test_the_plan_of_minutes_is_kept_when_the_run_is_resumed(few_pictures, tmp_path, monkeypatch, caplog):
    recipe = Recipe("quick", (Stage(3000, 32), Stage(1500, 64)), 1e-3, 10, keyword_prob=0.1, augmentation=1.0)
    monkeypatch.setattr(demo, "QUICK", recipe)
    config = recipe.config
    monkeypatch.setattr(Recipe, "config", lambda self, **kw: replace(config(**kw), batch_size=8))
    monkeypatch.setattr(demo, "measure_speed", lambda *_: {32: 0.5, 64: 1.0})
    with caplog.at_level(logging.INFO, "florence_fast"):
        results = demo.run(tmp_path, minutes=1.2)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan == {"recipe": "quick", "steps": [12, 6], "minutes": 1.2} and results["steps"] == 18
    assert [r.message for r in caplog.records if "on this machine" in r.message]
    assert len([r for r in caplog.records if "Loss:" in r.message]) == 2
    # A machine of another speed, and no minutes: the steps stay.
    monkeypatch.setattr(demo, "measure_speed", lambda *_: {32: 5.0, 64: 10.0})
    assert demo.run(tmp_path, resume=True)["steps"] == 18
    with pytest.raises(ValueError, match="holds a run of the recipe 'quick', wanted 'long'"):
        demo.run(tmp_path, long=True, resume=True)


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
