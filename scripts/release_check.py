"""Build the source archive and the wheel, and run the README's examples from each in a fresh environment.

The environment has no compiler on its path. The source archive is installed there without native kernels, the wheel
with those that were compiled here. `make release-check` runs it; everything lies in build/release.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "release"
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNTRAINED = """
import transformers
_swin = transformers.SwinForImageClassification
_swin.from_pretrained = classmethod(lambda cls, name: cls(transformers.SwinConfig()))  # no download
"""


def run(*command: str | Path, **variables: str) -> str:
    """Run a command away from the checkout; its output is returned, and shown when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run([str(part) for part in command], cwd=OUT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def example(title: str) -> tuple[str, list[str]]:
    """Return the code of a section of the README, and the lines that it prints."""
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", section, re.DOTALL)
    assert found, f"no example under {title!r}"
    return found[1], found[2].splitlines()


def names(lines: list[str]) -> list[str]:
    """Leave out the figures, which another processor may round differently, and the backend."""
    return [" ".join(word for word in line.split() if "%" not in word) for line in lines if "backend" not in line]


def check(bin: Path) -> None:
    """Run the commands and the examples of the README in an environment."""
    path = {"PATH": str(bin), "CXX": "no-compiler"}
    print(run(bin / "florence-fast", "--version", **path).strip())
    run(bin / "florence-fast", "info", **path)
    run(bin / "florence-fast", "verify", "--no-times", **path)
    for title, before in (("Zero-shot classification", ""), ("Speed up the Swin you already have", UNTRAINED)):
        code, expected = example(title)
        printed = run(bin / "python", "-c", before + code, **path).splitlines()
        if names(printed) != names(expected):
            sys.exit(f"{title}: the README shows\n{chr(10).join(expected)}\nand this printed\n{chr(10).join(printed)}")
        print(f"{title}: as the README shows")


def main() -> None:
    """Build both, then install and check each."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", OUT, ROOT)
    (archive,), (wheel,) = OUT.glob("*.tar.gz"), OUT.glob("*.whl")
    venv.create(OUT / "venv", with_pip=True)
    bin = OUT / "venv" / "bin"
    index = os.environ.get("TORCH_INDEX")
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    pip += ["--extra-index-url", index] if index else []
    run(*pip, "setuptools", "pybind11", "ninja", "transformers")
    for built in (archive, wheel):
        print(f"installing {built.name}")
        fresh = ["--force-reinstall", "--no-deps"] if built is wheel else ["--no-build-isolation"]
        run(*pip, *fresh, built, CXX="no-compiler")
        check(bin)


if __name__ == "__main__":
    main()
