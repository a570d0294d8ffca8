"""The scripts in examples/ run as they are written, on little data, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from florence_fast.data import artists_test

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *args: object, cwd: Path) -> str:
    """Run an example in a folder of its own and return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'run("{path.name}"' not in source] == []


def test_accelerate_swin_changes_nothing_but_time(tmp_path):
    pytest.importorskip("transformers")
    printed = run("accelerate_swin.py", "--batch-size", 1, "--turns", 1, cwd=tmp_path)
    assert "swapped  transformers SwinLayer" in printed
    assert float(re.search(r"difference of a logit: (\S+)", printed)[1]) < 1e-5


def test_search_folder_finds_the_named_image_first(tmp_path):
    images = artists_test()
    (tmp_path / "images").mkdir()
    for index in range(0, 160, 10):
        images.image(index).save(tmp_path / "images" / f"{index:03}.png")
    printed = run("search_folder.py", "images", images.texts(0).text, "--index", "index.safetensors", cwd=tmp_path)
    assert "images/000.png" in printed.splitlines()[1]
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert page.count("<img") == 8 and (tmp_path / "index.safetensors").is_file()


@pytest.mark.slow
def test_finetune_on_captions_improves_what_was_held_out(tmp_path):
    printed = run("finetune_on_captions.py", "--steps", 16, "--batch-size", 64, "--out", "run", cwd=tmp_path)
    assert "480 pairs to train on, 120 held out" in printed
    before, after = map(float, re.search(r"text to image r1: (\S+)% before, (\S+)% after", printed).groups())
    assert after > before
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_backbone_in_your_loop_learns(tmp_path):
    printed = run("backbone_in_your_loop.py", "--steps", 21, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 2 and losses[-1] < losses[0]
