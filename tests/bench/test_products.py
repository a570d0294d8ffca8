"""The comparison of the libraries of products, at sizes that take no time."""

import json
from pathlib import Path

import pytest

from bench.cpu import products


def test_the_table_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(products, "swin_products", lambda *_: iter([(8, 4, 12), (8, 16, 4)]))
    assert products.main(["--turns", "2", "--out", str(tmp_path / "products.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("| rows, in -> out |") and "| 8, 16 -> 4 |" in shown and "| all |" in shown
    kept = json.loads((tmp_path / "products.json").read_text())
    assert [row["size"] for row in kept["rows"]] == [[8, 4, 12], [8, 16, 4]]
    assert all(row[f"{product} plain"] > 0 for row in kept["rows"] for product in products.PRODUCTS)


def test_the_layers_of_a_swin() -> None:
    sizes = list(products.swin_products(96, 8))
    assert len(sizes) == 19 and sizes[0] == (25088, 96, 288) and sizes[-1] == (392, 3072, 768)
