"""The README says what was recorded, and its example prints what stands below it."""

import contextlib
import io
import re

import pytest

from bench import readme
from bench.report_rows import Device

TEXT = readme.README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_recorded_results():
    assert readme.fill(TEXT) == TEXT, "run python -m bench.readme"


def test_a_changed_result_changes_the_table(monkeypatch):
    recorded = readme.load
    worse = {"top1": 0.1234, "top5": 0.5, "images": 1, "classes": 2}
    monkeypatch.setattr(readme, "load", lambda name: {**recorded(name), "zero_shot": worse})
    assert "12.3%" in readme.fill(TEXT)


def test_a_measured_gpu_takes_the_place_of_not_measured_yet(monkeypatch):
    row = {
        "key": "k", "op": "layer_norm", "shape": "maps", "sizes": {}, "dtype": "bf16", "mode": "forward",
        "competitor": "ours (triton)", "status": "timed", "median": 4.5e-3, "q20": 4e-3, "q80": 5e-3,
        "device": "NVIDIA A100", "driver": "570",
    }  # fmt: skip
    monkeypatch.setattr(readme, "read_devices", lambda folder: [Device("NVIDIA A100", [row])])
    part = readme.fill(TEXT).split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert "NVIDIA A100, driver 570; bf16" in part and "| layer_norm | maps | forward | 4.500 |" in part
    assert "No GPU has run this" not in part
    monkeypatch.setattr(readme, "read_devices", lambda folder: [])
    assert "No GPU has run this: not measured yet." in readme.fill(TEXT)


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match=r"README\.md must hold <!-- demo:begin -->"):
        readme.fill("nothing here")


def test_the_example_prints_what_the_readme_shows():
    code, shown = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", TEXT, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    rows, expected = printed.getvalue().splitlines(), shown.splitlines()
    assert [row.split(maxsplit=1)[1] for row in rows] == [row.split(maxsplit=1)[1] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        # Another processor may round differently in the last place.
        assert float(row.split("%")[0]) == pytest.approx(float(wanted.split("%")[0]), abs=0.3)
