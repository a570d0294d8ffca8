"""The pages that people look at, in Chromium at 400 and 1,200 px, light and dark: docs, report, contact sheet."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence_fast.demo.report import write_report
from florence_fast.evaluate.contact_sheet import contact_sheets
from florence_fast.evaluate.search import Hit
from florence_fast.ops import OPS
from tests.browser import WIDTHS, chromium, look_at

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[False, True], ids=["light", "dark"])
def dark(request) -> bool:
    return request.param


def check(folder: Path, pages: list[str], tmp_path: Path, dark: bool) -> None:
    """Assert that nothing overflows, every image loads and all text can be read."""
    seen = look_at(folder, pages, tmp_path, dark=dark)
    assert [(found.page, found.width) for found in seen] == [(page, width) for page in pages for width in WIDTHS]
    assert all(found.dark == dark for found in seen)
    assert [found for found in seen if found.over > 0 or found.broken or found.faint] == []


def draw(path: Path, width: int, height: int) -> None:
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    chromium()
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)], cwd=ROOT, check=True)
    return out


@pytest.mark.slow
def test_the_documentation_can_be_read(site, tmp_path, dark):
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("index.html"))
    assert len(pages) > 20
    check(site, pages, tmp_path, dark)


@pytest.mark.slow
def test_the_reference_has_every_op(site):
    page = (site / "reference" / "ops" / "index.html").read_text(encoding="utf-8")
    assert [name for name in OPS if f'.{name}"' not in page] == []


def test_a_report_can_be_read(tmp_path, dark):
    out = tmp_path / "report"
    out.mkdir()
    for name, size in (("curves", (850, 306)), ("queries", (880, 890)), ("readings", (1150, 510))):
        draw(out / f"{name}.png", *size)
    shares, grounds = {"top1": 0.5, "top5": 0.7, "top10": 0.8}, {"white": 0.8, "blue": 0.5, "dots": 0.4, "mean": 0.45}
    recalls = {way: {"r1": 0.4, "r5": 0.6, "r10": 0.7} for way in ("image_to_text", "text_to_image")}
    figures = {"zero_shot": {**shares, "images": 1696, "classes": 2921}, "retrieval": recalls, "grounds": grounds}
    run = {"model": "florence_nano", "parameters": 9.5e6, "images_seen": 268800, "seconds": 366, "loss": "unicl"}
    made = {"commit": "0123456789abcdef", "version": "0.1.0", "torch": "2.13.0", "threads": 2, "date": "2026-01-01"}
    command = "florence-fast demo --resume --out /home/somebody/a/long/path/that/no/line/can/hold/" + "x" * 60
    results = {**figures, **run, **made, "images_per_second": 730, "command": command, "device": "CPU, AVX2"}
    write_report(out / "report.html", {**results, "shipped": figures, "clip_baseline": None}, out)
    check(out, ["report.html"], tmp_path, dark)


def test_a_contact_sheet_can_be_read(tmp_path, dark):
    out = tmp_path / "sheet"
    out.mkdir()
    hits = []
    for number in range(6):
        path = out / f"{'a_long_name_without_a_break' * 3}_{number}.png"
        draw(path, 300, 100 + 80 * number)
        hits.append(Hit(path, 0.3 - number / 100))
    page = contact_sheets([("a red apple", hits), ("a violin", hits[:1])], out)
    (out / "sheet.html").write_text(page, encoding="utf-8")
    check(out, ["sheet.html"], tmp_path, dark)


def test_what_is_wrong_with_a_page_is_found(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    text = '<body style="background:#fff"><p style="width:900px;color:#ddd">faint and wide</p><img src="none.png">'
    (folder / "bad.html").write_text(f"<!doctype html>{text}", encoding="utf-8")
    narrow, wide = look_at(folder, ["bad.html"], tmp_path)
    assert narrow.over > 400 and wide.over == 0
    assert narrow.broken == wide.broken == ["none.png"]
    assert len(narrow.faint) == len(wide.faint) == 1
