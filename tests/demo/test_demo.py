"""The whole demo on a few dozen real images: every file it promises, and figures that agree with each other."""

import contextlib
import io
import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from florence_fast import demo
from florence_fast.data.artists import artists_test, artists_train
from florence_fast.data.pairs import PairText, Subset
from florence_fast.demo import curves, grounds, progress, sheets, shipped
from florence_fast.demo.recipe import Recipe
from florence_fast.models import create_model
from florence_fast.train.config import Stage


@pytest.fixture(scope="module")
def few_images():
    """Forty test images and the training images of the same names."""
    test = Subset(artists_test(), range(0, 1600, 40))
    known = {test.texts(index).text for index in range(len(test))}
    whole = artists_train()
    train = Subset(whole, [index for index in range(len(whole)) if whole.texts(index).text in known])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "artists_train", lambda: train)
        for module in (demo, progress, shipped):
            patch.setattr(module, "artists_names", lambda: sorted(known))
        for module in (demo, grounds, progress, sheets, shipped):
            patch.setattr(module, "artists_test", lambda: test)
        yield test


@pytest.fixture(scope="module")
def rehearsed(few_images, tmp_path_factory):
    """Results, folder and terminal output of one rehearsal."""
    out = tmp_path_factory.mktemp("rehearsal") / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = demo.run(out, steps=3)
    return results, out, printed.getvalue()


@pytest.fixture
def without_shipped(few_images, monkeypatch):
    """Leave the shipped weights out, whose figures another test looks at."""
    shares = dict.fromkeys(("white", "mean", *grounds.GROUNDS), 0.5)
    monkeypatch.setattr(demo, "on_grounds", lambda *_, **__: shares)
    figures = {"zero_shot": {"top1": 0.5}, "grounds": shares}
    monkeypatch.setattr(demo, "show_shipped", lambda *_: figures)


def test_a_rehearsal_writes_everything_that_it_promises(rehearsed):
    results, out, _ = rehearsed
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("curves", "queries", "readings"):
        image = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert image.std() > 5, f"{name}.png is blank"
    assert (out / "model" / "model.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert 'src="http' not in page and f"{results['zero_shot']['top1']:.1%}" in page


def test_the_figures_are_fractions_of_the_right_pools(rehearsed):
    results, _, _ = rehearsed
    found, recalls = results["zero_shot"], results["retrieval"]
    assert (found["classes"], found["images"]) == (40, 40)
    assert 0 <= found["top1"] <= found["top5"] <= found["top10"] <= 1
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= recalls[direction]["r1"] <= recalls[direction]["r5"] <= recalls[direction]["r10"] <= 1
    assert results["steps"] == 3 and results["images_per_second"] > 0 and results["seconds"] > 0


def test_it_says_first_what_the_shipped_weights_read(rehearsed):
    results, out, printed = rehearsed
    assert printed.index("The shipped weights") < printed.index("an artist never seen")
    assert f"{results['shipped']['zero_shot']['top1']:.1%} of 40" in printed
    assert results["shipped"]["grounds"].keys() == results["grounds"].keys() == {"white", "mean", *grounds.GROUNDS}
    page = (out / "report.html").read_text()
    assert f"{results['grounds']['mean']:.0%}" in page and f"{results['shipped']['zero_shot']['top1']:.1%}" in page


def test_the_plan_of_minutes_is_kept_when_the_run_is_resumed(without_shipped, tmp_path, monkeypatch, caplog):
    recipe = Recipe("quick", (Stage(3000, 32), Stage(1500, 64)), 1e-3, 10, keyword_prob=0.1, augmentation=1.0)
    monkeypatch.setattr(demo, "QUICK", recipe)
    run = recipe.run
    monkeypatch.setattr(Recipe, "run", lambda self, **kw: replace(run(**kw), batch_size=8))
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


def test_a_run_from_weights_ends_with_an_average_of_both(without_shipped, tmp_path, monkeypatch):
    shipped_weights = create_model("florence_nano", pretrained="artists").state_dict()
    monkeypatch.setattr(demo, "FURTHER", replace(demo.FURTHER, keep=1.0))
    assert demo.run(tmp_path / "demo", pretrained="artists", steps=2)["pretrained"] == "artists"
    saved = create_model("florence_nano", pretrained=tmp_path / "demo" / "model").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in shipped_weights.items())


def test_the_average_gives_each_its_share():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.75 * model.weight.detach() + 0.25 * other.weight.detach()
    demo.average_(model, other.state_dict(), 0.25)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_an_earlier_run_is_not_overwritten(rehearsed):
    _, out, _ = rehearsed
    with pytest.raises(FileExistsError, match="holds a run already"):
        demo.run(out, steps=3)


def test_right_images_are_those_that_unicode_calls_so():
    apple = PairText("red apple", "red apple", ["fruit", "red"])
    assert sheets.describes("Fruit", apple) and sheets.describes("red apple", apple)
    assert not sheets.describes("apple", apple)


def test_a_curve_of_one_point_can_be_seen(tmp_path):
    dots = []
    for losses in (1, 0):
        history = [{"seconds": 5, "loss": 6.0}] * losses + [{"seconds": 5, "top1": 0.1, "top5": 0.2, "image_size": 32}]
        curves.draw_curves(tmp_path / "curves.png", history)
        left = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))[40:-60, 80:560].astype(int)
        dots.append((np.abs(left - (15, 118, 110)).sum(-1) < 40).sum())
    assert dots[0] > 10 and dots[1] == 0


def test_what_all_artists_draw_is_drawn_by_all_of_them():
    whole, test = artists_train(), artists_test()
    drawn = Counter(whole.texts(index).text for index in range(len(whole)))
    assert [drawn[name] for name in sheets.DRAWN_BY_ALL] == [6, 6]
    assert set(sheets.DRAWN_BY_ALL) <= {test.texts(index).text for index in range(len(test))}


def test_curves_are_drawn_for_a_run_that_changes_its_size(tmp_path):
    history = [{"seconds": s, "loss": 6 - s / 10} for s in range(4)]
    history += [{"seconds": s, "top1": s / 10, "top5": s / 5, "image_size": 32 if s < 2 else 64} for s in range(4)]
    curves.draw_curves(tmp_path / "curves.png", history)
    assert Image.open(tmp_path / "curves.png").size == (1200, 432)
