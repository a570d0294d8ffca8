"""docs/benchmarks.md says what was recorded."""

import pytest

from bench import machine
from bench.report import page
from bench.report.rows import Device

TEXT = page.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_recorded_results():
    assert page.fill(TEXT) == TEXT, "run python -m bench.report.page"


def test_a_changed_result_changes_the_table(monkeypatch):
    recorded = page.load
    worse = {"top1": 0.1234, "top5": 0.5, "images": 1, "classes": 2}
    monkeypatch.setattr(page, "load", lambda name: {**recorded(name), "zero_shot": worse})
    assert "12.3%" in page.fill(TEXT)


def test_a_measured_gpu_takes_the_place_of_not_measured_yet(monkeypatch):
    row = {
        "key": "k", "op": "layer_norm", "shape": "maps", "sizes": {}, "dtype": "bf16", "mode": "forward",
        "competitor": "ours (triton)", "status": "timed", "median": 4.5e-3, "q20": 4e-3, "q80": 5e-3,
        "device": "NVIDIA A100", "driver": "570",
    }  # fmt: skip
    monkeypatch.setattr(page, "read_devices", lambda folder: [Device("NVIDIA A100", [row])])
    part = page.fill(TEXT).split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert "NVIDIA A100, driver 570; bf16" in part and "| layer_norm | maps | forward | 4.500 |" in part
    assert "No GPU has run this" not in part
    monkeypatch.setattr(page, "read_devices", lambda folder: [])
    assert "No GPU has run this: not measured yet." in page.fill(TEXT)


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match=r"docs/benchmarks\.md must hold <!-- demo:begin -->"):
        page.fill("nothing here")


def test_rows_say_when_a_file_that_decides_them_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine.sources.cache_clear()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("a = 1")
    row = {"date": "2026-11-25", "torch": "2.11.0", "triton": "3.6.0"}
    row["sources"] = machine.sources(("kernels",), "2.11.0", "3.6.0")
    later = row | {"date": "2026-11-29"}
    assert machine.recorded([later, row], ("kernels",)) == "recorded 2026-11-25 to 2026-11-29"
    (tmp_path / "kernels" / "a.py").write_text("a = 2")
    machine.sources.cache_clear()
    said = machine.recorded([row], ("kernels",))
    machine.sources.cache_clear()
    assert said == "recorded 2026-11-25, before the latest change of the code that it measures"
