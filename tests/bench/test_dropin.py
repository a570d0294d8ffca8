"""``bench.cpu.dropin`` runs to its end on small inputs, says what it did, and fails when a result moves."""

import json

import pytest
import torch

from bench.cpu import dropin
from bench.cpu.dropin_models import CASES

pytest.importorskip("transformers")


def test_rehearsal_measures_compares_and_draws(tmp_path, capsys):
    assert dropin.main(["--rehearse", "--only", "Swin2SR", "--only", "backbone", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("dropin-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {(row["model"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in CASES if "Swin2SR" in name or "backbone" in name for dtype in ("fp32", "bf16")
    }
    assert all(row["swapped"] and row["error"] <= row["bound"] and row["times"]["after"] > 0 for row in rows)
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert "transformers Swin2SR" in capsys.readouterr().out
    text = dropin.page_text(tmp_path)
    assert text.count("| transformers Swin2SR |") == 2


def test_a_result_that_moves_is_a_failure(tmp_path, monkeypatch):
    def spoil(model, verbose):
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return dropin.compat.Report({"spoilt": ["everything"]})

    monkeypatch.setattr(dropin.compat, "accelerate", spoil)
    assert dropin.main(["--rehearse", "--only", "Swin2SR", "--out", str(tmp_path)]) == 1


def test_a_library_that_is_absent_is_a_row_with_its_reason(tmp_path, monkeypatch):
    def build(batch, size):
        raise ImportError("No module named 'nobody'")

    monkeypatch.setitem(dropin.CASES, "nobody's Swin", dropin.Case(build))
    assert dropin.main(["--rehearse", "--only", "nobody", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("dropin-*.json")
    assert all(row["status"] == "missing" and "nobody" in row["reason"] for row in json.loads(path.read_text())["rows"])
