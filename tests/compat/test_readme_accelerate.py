"""The README's section on models of other libraries: its code runs and prints what stands below it."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
transformers = pytest.importorskip("transformers")


def test_the_example_runs_and_prints_what_the_readme_shows(monkeypatch, capsys):
    section = TEXT.split("## Speed up the Swin you already have\n")[1].split("\n## ")[0]
    code, shown = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", section, re.DOTALL).groups()
    asked = []

    def untrained(cls, name):
        """Stand in for the download: the same sizes, which are the configuration's defaults, with random weights."""
        asked.append(name)
        return cls(transformers.SwinConfig())

    monkeypatch.setattr(transformers.SwinForImageClassification, "from_pretrained", classmethod(untrained))
    exec(compile(code, "README.md", "exec"), {})
    assert asked == ["microsoft/swin-tiny-patch4-window7-224"]
    found = capsys.readouterr().out
    *lines, backend = shown.splitlines()
    assert found.splitlines()[:-1] == lines
    assert backend == "backend  cpp: native kernels, avx2" and found.splitlines()[-1].startswith("backend  ")
