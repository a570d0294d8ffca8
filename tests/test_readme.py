"""The README's zero-shot example prints what the README shows below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_readme_shows():
    section = TEXT.split("## Zero-shot classification\n")[1].split("\n## ")[0]
    code, shown = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", section, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    rows, expected = printed.getvalue().splitlines(), shown.splitlines()
    assert [row.split(maxsplit=1)[1] for row in rows] == [row.split(maxsplit=1)[1] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        # Another processor may round differently in the last place.
        assert float(row.split("%")[0]) == pytest.approx(float(wanted.split("%")[0]), abs=0.3)


def test_every_link_and_image_exists():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *(root / "docs").rglob("*.md"), root / "bench" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
