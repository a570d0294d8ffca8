"""The README says what was recorded, and its example prints what stands below it."""

import contextlib
import io
import re

import pytest

from bench import readme

TEXT = readme.README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_recorded_results():
    assert readme.fill(TEXT) == TEXT, "run python -m bench.readme"


def test_a_changed_result_changes_the_table(monkeypatch):
    recorded = readme.load
    worse = {"top1": 0.1234, "top5": 0.5, "images": 1, "classes": 2}
    monkeypatch.setattr(readme, "load", lambda name: {**recorded(name), "zero_shot": worse})
    assert "12.3%" in readme.fill(TEXT)


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
