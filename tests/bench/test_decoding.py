"""The decoding benchmark: it runs, and compares what it times."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.cpu import decoding


def test_it_runs_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    monkeypatch.setattr(decoding, "photographs", lambda: [tiny.resize((80, 60), Image.Resampling.BICUBIC)])
    assert decoding.main(["--out", str(tmp_path), "--sides", "300"]) == 0
    assert "shorter side 300, to 224 x 224" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "decoding.json").read_text())["rows"]
    assert row["loaders"]["Pillow"]["largest_difference"] == 0 and row["loaders"]["Pillow"]["ratio"] == 1
    assert row["loaders"]["ours"]["mean_difference"] < 0.1


def test_without_photographs_it_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    assert decoding.main([]) == 2
    assert "pip install --no-deps scikit-image" in capsys.readouterr().err
