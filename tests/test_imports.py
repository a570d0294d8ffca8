"""Imports point one way: each layer may import those below it and nothing above, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part of florence_fast may import from the rest of it. Leaves are free to all.
LEAVES = {
    "build_failure",
    "checks",
    "console",
    "env",
    "errors",
    "files",
    "on_import",
    "precision",
    "printable",
    "processor",
    "provenance",
    "ranges",
    "strict_json",
    "text_files",
    "timing",
    "version",
}
ALLOWED = {
    **{leaf: set() for leaf in LEAVES},
    "kernels": set(),
    "_C": set(),
    "native": {"_C"},
    "ops": {"kernels", "native"},
    "data": {"native"},
    "models": {"ops", "data"},
    "compat": {"ops", "native", "models", "data", "train"},
    "heads": {"ops", "models", "data"},
    "train": {"ops"},  # the engine knows no data, no model and no task
    "tasks": {"ops", "models", "heads", "data", "train", "evaluate"},
    "evaluate": {"ops", "models", "heads", "data"},
    "info": {"ops", "native", "data"},
    "verify": {"ops"},
    "profile": {"models", "data", "train", "tasks"},
    "warmup": {"ops", "models"},
    "export": {"ops", "models"},
    "demo": {"ops", "models", "data", "train", "tasks", "evaluate"},
    "cli": {
        "ops",
        "native",
        "models",
        "heads",
        "data",
        "train",
        "tasks",
        "evaluate",
        "compat",
        "info",
        "verify",
        "profile",
        "warmup",
        "export",
        "demo",
    },
    "__main__": {"cli"},
}
KERNELS_MAY_IMPORT = {"torch", "triton"}


def source_files() -> list[Path]:
    return sorted([*(ROOT / "florence_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def part_of(path: Path) -> str:
    """The part that a file belongs to: 'ops' for florence_fast/ops/x.py, 'cli' for florence_fast/cli/train.py."""
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, in functions too; names imported from a package count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_the_layers_below_it(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in ALLOWED, f"{part} is a new part of florence_fast: give it a row in ALLOWED"
    for module in imported_modules(path):
        names = module.split(".")
        assert names[0] not in {"bench", "tests", "scripts"}, f"{part} must not import {module}"
        if part == "kernels":
            ours = names[:2] == ["florence_fast", "kernels"]
            standard = names[0] in __import__("sys").stdlib_module_names
            assert ours or standard or names[0] in KERNELS_MAY_IMPORT, f"kernels must not import {module}"
        elif names[0] == "florence_fast" and len(names) > 1 and names[1] in ALLOWED:
            allowed = ALLOWED[part] | LEAVES | {part}
            assert names[1] in allowed, f"{part} must not import {module}: it may import {sorted(allowed)}"


def test_the_engine_knows_no_loss():
    """What a step computes is the task's: nothing that the engine imports, however far, is a loss or a collator."""
    folder = ROOT / "florence_fast" / "train"
    seen, waiting = set(), ["engine"]
    while waiting:
        name = waiting.pop()
        if name not in seen and (folder / f"{name}.py").is_file():
            seen.add(name)
            waiting += [
                module.split(".")[2] for module in imported_modules(folder / f"{name}.py") if ".train." in module
            ]
    assert {"state", "task", "resume"} <= seen
    assert not seen & {"loss", "grad_cache", "ring"}


def test_json_is_read_and_written_in_one_place():
    """strict_json refuses what is nested too deeply and writes no NaN; nothing goes past it."""
    users = [path for path in source_files() if "json" in imported_modules(path) and part_of(path) != "kernels"]
    assert [path.name for path in users] == ["strict_json.py"]


def test_progress_bars_are_those_that_notebooks_can_show():
    bars = {name for path in source_files() for name in imported_modules(path) if name.endswith(".tqdm")}
    assert bars == {"tqdm.auto.tqdm"}


def test_the_package_itself_needs_neither_torch_nor_triton():
    import subprocess
    import sys

    code = (
        "import sys, florence_fast, florence_fast.cli; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
