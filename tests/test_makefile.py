"""What `make` installs: the demo gets the package alone, tests their tools and, as the budget does, a second Triton."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(target: str, tmp_path: Path) -> str:
    """The commands that `make target` would run in a fresh clone."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    return subprocess.run(
        ["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("target", ["demo", "demo-long", "native"])
def test_a_demo_installs_the_package_and_no_extras(target, tmp_path):
    printed = commands(target, tmp_path)
    assert "--editable ." in printed and "triton" not in printed and "[test" not in printed
    assert printed.index("--editable .") < printed.index("build_ext")


@pytest.mark.parametrize("target", ["test", "test-all", "bench", "compat", "lint"])
def test_tests_install_their_tools(target, tmp_path):
    assert "'.[test,dev,tensorboard]'" in commands(target, tmp_path)


@pytest.mark.parametrize("target", ["test", "test-all", "budget"])
def test_what_compiles_kernels_installs_a_second_triton(target, tmp_path):
    assert "triton==3.6.0" in commands(target, tmp_path)


@pytest.mark.parametrize("target", ["bench", "compat", "lint"])
def test_nothing_else_installs_it(target, tmp_path):
    assert "triton" not in commands(target, tmp_path)
