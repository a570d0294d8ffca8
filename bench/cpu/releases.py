"""Which releases of other libraries ``ff.accelerate`` works with: ``python -m bench.cpu.releases``, `make compat`.

Every row of ENVIRONMENTS is one release: the oldest, the newest, and those between that a library changed its Swin
with. Its packages go into a folder of ``build/compat``, once; a child process finds them there before those of the
environment that this runs in, and runs the tests of ``tests/compat`` that are about the library. What they said goes to
``bench/results/compat.json`` and from there into docs/benchmarks.md. The exit code is 1 if a test failed, or if one of
the files ended without a test that passed: a library that cannot be imported skips them all.
"""

import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.cpu.rows.base import CPU
from bench.machine import facts
from bench.report.tables import Sheet
from florence_fast.files import write_json, write_text

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "compat"
TESTS = ROOT / "tests" / "compat"
RESULTS = ROOT / "bench" / "results"
MINUTES = 15
"""After which the tests of one release are ended."""
BESIDE = ("torch", "numpy", "tokenizers", "huggingface_hub", "safetensors")
"""Packages whose versions a row holds too, wherever they came from."""
SHOWN = {
    "transformers": ("tokenizers", "huggingface_hub"),
    "timm": ("torchvision",),
    "open_clip_torch": ("timm", "torchvision"),
}
"""What the page shows of that, by library."""
HEAD = ["library", "release", "which is", "with", "passed", "skipped", "failed"]


@dataclass(frozen=True)
class Environment:
    """One release of a library, and what has to stand beside it."""

    library: str
    which: str
    """What is special about this release: it is the oldest, the newest, ..."""
    pins: tuple[str, ...]
    """Every package that is installed, as ``name==version``, the library first."""
    tests: tuple[str, ...]
    """Patterns of the files in ``tests/compat`` that are about the library."""

    @property
    def name(self) -> str:
        """Say the release in a word, such as ``timm-0.9.6``."""
        return self.pins[0].replace("==", "-")


_REQUESTS = (
    *("requests==2.34.2", "urllib3==2.8.0", "idna==3.20"),
    *("certifi==2026.10.19.post1", "charset_normalizer==3.5.3"),
)
_HTTPX = ("httpx==0.28.1", "httpcore==1.0.9", "certifi==2026.10.19.post1", "typer_slim==0.24.0")
_TORCHVISION = "torchvision==0.29.1"
_OF_TRANSFORMERS = (
    *("test_accelerate*.py", "test_hugging_face*.py", "test_transformers*.py"),
    *("test_readme_accelerate.py", "test_convert.py", "test_import_order.py", "test_leaves.py"),
)
_OF_TIMM = ("test_timm*.py", "test_convert.py", "test_import_order.py")

ENVIRONMENTS = (
    # Before it Swin V2's layer takes other arguments, and is no backbone.
    Environment(
        "transformers",
        "oldest",
        ("transformers==4.37.0", "tokenizers==0.15.2", "huggingface_hub==0.27.1", *_REQUESTS),
        _OF_TRANSFORMERS,
    ),
    Environment(
        "transformers",
        "last of 4.x",
        ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2", *_REQUESTS),
        _OF_TRANSFORMERS,
    ),
    Environment(
        "transformers",
        "first of 5.x",
        ("transformers==5.0.0", "tokenizers==0.22.2", "huggingface_hub==1.3.7", *_HTTPX),
        _OF_TRANSFORMERS,
    ),
    Environment("transformers", "newest", ("transformers==5.24.0",), _OF_TRANSFORMERS),
    # Before it a block has no attention apart from the rest of it, and buffers that belong to no checkpoint are saved.
    Environment("timm", "oldest", ("timm==0.9.6", _TORCHVISION), _OF_TIMM),
    Environment("timm", "newest", ("timm==1.0.31", _TORCHVISION), _OF_TIMM),
    Environment("torchvision", "recent", (_TORCHVISION,), ("test_torchvision*.py", "test_convert.py")),
    Environment("monai", "newest", ("monai==1.6.1", "einops==0.8.2"), ("test_monai*.py",)),
    Environment(
        "open_clip_torch",
        "newest",
        ("open_clip_torch==3.3.0", "timm==1.0.31", _TORCHVISION, "ftfy==6.3.1", "wcwidth==0.9.4"),
        ("test_open_clip*.py", "test_convert.py"),
    ),
)


class Unusable(Exception):
    """A release could not be installed, or is not what the child process finds."""


def main(args: list[str] | None = None) -> int:
    """Run the command."""
    from tqdm.auto import tqdm

    parser = argparse.ArgumentParser(prog="python -m bench.cpu.releases", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="releases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    options = parser.parse_args(args)
    path = options.out / "compat.json"
    rows = {row["name"]: row for row in read(path)}
    chosen = [one for one in ENVIRONMENTS if not options.only or any(text in one.name for text in options.only)]
    with tqdm(chosen, unit="release") as bar:
        for environment in bar:
            bar.set_postfix_str(environment.name)
            row = rows[environment.name] = check(environment)
            tqdm.write(f"{environment.name}: {row['passed']} passed" + "".join(f"\n  {b}" for b in row["broken"]))
            # In the table's order, without the releases that it no longer has.
            kept = [rows[one.name] for one in ENVIRONMENTS if one.name in rows]
            write_json(path, {"seconds": round(sum(row["seconds"] for row in kept)), "rows": kept})
    print(f"\n{page_text(options.out)}")
    if options.out == RESULTS:
        from bench.report import page  # which writes this table, too

        page.write()
    return int(any(rows[one.name]["broken"] for one in chosen) or not chosen)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows that were recorded; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def check(environment: Environment) -> dict[str, Any]:
    """Install a release where that is still to do, run its tests, and return what is recorded of it.

    ``broken`` holds what speaks against the release, a line each; none if all is well.
    """
    now = facts(CPU)
    start = time.monotonic()
    row = {
        "name": environment.name,
        "library": environment.library,
        "which": environment.which,
        "pins": list(environment.pins),
        **{"versions": {}, "files": {}, "passed": 0, "failed": 0, "skipped": {}, "broken": []},
        "python": platform.python_version(),
        **{name: now[name] for name in ("device", "torch", "commit", "date")},
    }
    try:
        install(environment)
        row["install_seconds"] = round(time.monotonic() - start, 1)
        row["versions"] = versions(environment)
        row |= run_tests(environment)
    except Unusable as error:
        row["broken"] = [str(error)]
    except subprocess.TimeoutExpired:
        row["broken"] = [f"the tests did not end in {MINUTES} minutes"]
    return row | {"seconds": round(time.monotonic() - start, 1)}


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])


def install(environment: Environment) -> None:
    """Put the pinned packages, and nothing that they ask for, into the release's folder, unless they are there.

    The stamp is written last, so an installation that was cut short is done again.

    Raises:
        Unusable: pip failed; the message holds what it said.
    """
    folder = BUILD / environment.name
    stamp, wanted = folder / "pins.txt", "\n".join([f"python {platform.python_version()}", *environment.pins, ""])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--target", str(folder), *environment.pins], dict(os.environ), "pip")
    write_text(stamp, wanted)


def versions(environment: Environment) -> dict[str, str]:
    """Ask a process with the surroundings of the tests for the versions that it finds, of BESIDE as well.

    Raises:
        Unusable: a package is not there, or is not the release that is pinned.
    """
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    pinned = dict(pin.split("==") for pin in environment.pins)
    command = [sys.executable, "-c", code, *dict.fromkeys([*pinned, *BESIDE])]
    found = json.loads(_run(command, _surroundings(environment), "the search for versions").splitlines()[-1])
    # Behind a plus stands which build of a release it is.
    wrong = [f"{name} {found[name]}" for name, version in pinned.items() if found[name].partition("+")[0] != version]
    if wrong:
        raise Unusable(f"{environment.name} must have {', '.join(environment.pins)}, got {', '.join(wrong)}")
    return found


def run_tests(environment: Environment) -> dict[str, Any]:
    """Run the tests that are about a release beside it, and return the entries of its row that say how they ended.

    Raises:
        subprocess.TimeoutExpired: they took longer than MINUTES.
        ValueError: there are none.
    """
    files = sorted({path for pattern in environment.tests for path in TESTS.glob(pattern)})
    if not files:
        raise ValueError(f"{environment.name} must have tests: nothing in {TESTS} is named {environment.tests}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", "--continue-on-collection-errors", "-m", "not gpu"]
        done = subprocess.run(
            [*command, f"--rootdir={TESTS}", "-p", "no:cacheprovider", f"--junitxml={report}", *map(str, files)],
            cwd=ROOT,
            env=_surroundings(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * MINUTES,
        )
        if not report.is_file():  # a crash, or a command line that pytest does not take
            return {"broken": [f"pytest ended with code {done.returncode}: {_last_lines(done.stdout)}"]}
        found = read_report(report, [path.stem for path in files])
    if done.returncode != 0 and not found["broken"]:
        found["broken"] = [f"pytest ended with code {done.returncode}: {_last_lines(done.stdout)}"]
    return found


def read_report(path: Path, files: Iterable[str]) -> dict[str, Any]:
    """Read pytest's JUnit file: how many tests of each file passed, why others were skipped, and what is broken.

    Args:
        files: names of the files that ran, without their suffix; one of which no test passed is broken.
    """
    passed, skipped, failed = Counter(), Counter(), []
    for case in ElementTree.parse(path).iter("testcase"):
        name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
        results = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
        problem = results["failure"] if results["failure"] is not None else results["error"]
        if problem is not None:
            failed.append(f"{name}: {_why_failed(problem)}")
        elif results["skipped"] is not None:
            skipped[_why_skipped(results["skipped"])] += 1
        else:
            passed[next((file for file in files if file in name.split(".")), name)] += 1
    idle = [f"{file}.py: no test of it passed" for file in files if not passed[file]]
    return {
        "files": {file: passed[file] for file in files},
        "passed": passed.total(),
        "failed": len(failed),
        "skipped": dict(sorted(skipped.items())),
        "broken": failed + idle,
    }


def _why_failed(problem: ElementTree.Element) -> str:
    """Give the first line of an error; that of a file which cannot be imported is the traceback's last."""
    message = problem.get("message", "")
    if message == "collection failure":
        message = (problem.text or message).strip().splitlines()[-1].removeprefix("E").lstrip()
    return message.partition("\n")[0][:300]


def _why_skipped(skipped: ElementTree.Element) -> str:
    """Give the reason of a test that was skipped; that of a whole file is the last of three parts of the text."""
    message = skipped.get("message", "")
    if message == "collection skipped" and skipped.text:
        message = ast.literal_eval(skipped.text)[2].removeprefix("Skipped: ")
    return message


def _surroundings(environment: Environment) -> dict[str, str]:
    """Return the variables under which a child finds the release before all else, and looks for nothing far away."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "TRITON_INTERPRET")}
    return {**kept, "PYTHONPATH": str(BUILD / environment.name), "HF_HUB_OFFLINE": "1"}


def _run(command: list[str], variables: dict[str, str], what: str) -> str:
    """Run a command to its end and return what it printed, or raise Unusable with that."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, env=variables, text=True, **streams)
    if done.returncode != 0:
        raise Unusable(f"{what} ended with code {done.returncode}: {_last_lines(done.stdout)}")
    return done.stdout


def page_text(folder: Path) -> str:
    """Return what docs/benchmarks.md shows: the releases that were tested, and how it ended."""
    rows = read(folder / "compat.json")
    if not rows:
        return "Not tested yet."
    lines = []
    for row in rows:
        beside = ", ".join(f"{name} {row['versions'].get(name)}" for name in SHOWN.get(row["library"], ()))
        counts = [str(row["passed"]), str(sum(row["skipped"].values())), str(row["failed"] or len(row["broken"]))]
        lines.append([row["library"], row["pins"][0].partition("==")[2], row["which"], beside, *counts])
    minutes = sum(row["seconds"] for row in rows) / 60
    last = max(rows, key=lambda row: row["date"])
    where = f"Python {last['python']}, torch {last['torch']}, {last['device']}; {minutes:.0f} minutes, `compat.json`."
    return f"{where}\n\n{Sheet('', HEAD, lines).markdown()}"


if __name__ == "__main__":
    sys.exit(main())
