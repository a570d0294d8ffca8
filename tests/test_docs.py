"""The pages of docs/: their Python runs, their commands and flags exist, their links lead somewhere."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer

from florence_fast import cli, env

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GENERATED = {"benchmarks.md"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[tuple[str, str | None]]:
    """The code of a page in one language, each with the output that stands below it, or None."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs_and_prints_what_stands_below_it(page, tmp_path, monkeypatch):
    if any("transformers" in code for code, _ in blocks(page, "python")):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code, expected in blocks(page, "python"):
        if 'device="cuda"' in code and not torch.cuda.is_available():
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        if expected:
            assert printed.getvalue() == expected


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page, comments left out and continued lines joined."""
    for code, _ in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def all_commands() -> list[tuple[str, list[str]]]:
    pages = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [(page.name, words) for page in pages if page.is_file() for words in commands(page)]


def ours(words: list[str]) -> list[str] | None:
    """The arguments of florence-fast in a command line, also behind torchrun, srun or python -m; None for others."""
    for position, word in enumerate(words):
        if word == "florence-fast" or (word == "florence_fast" and words[position - 1] == "-m"):
            return words[position + 1 :]
    return None


def command_of(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that arguments name, and those behind its name."""
    command = typer.main.get_command(cli.app)
    context = click.Context(command)
    while hasattr(command, "get_command"):
        known = command.list_commands(context)
        if arguments and arguments[0] in known:
            name, arguments = arguments[0], arguments[1:]
        elif "contrastive" in known:  # the task of `train` without a name
            name = "contrastive"
        else:
            break
        command = command.get_command(context, name)
    return command, arguments


@pytest.mark.parametrize(("page", "words"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_and_flag_exists(page, words):
    arguments = ours(words)
    if arguments is not None:
        command, rest = command_of(arguments)
        if command.context_settings.get("ignore_unknown_options"):  # all goes on to a script in bench/
            return
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= options | {"--help"}, f"{page}: florence-fast {command.name} takes no {given - options}"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE) or f" {words[1]} " in MAKEFILE
    elif words[:2] == ["python", "-m"]:
        module = ROOT.joinpath(*words[2].split("."))
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()


@pytest.mark.slow
def test_the_commands_of_the_quickstart_run_one_after_another(tmp_path, monkeypatch):
    page = ROOT / "docs" / "quickstart.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, _ in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    for words in commands(page):
        assert words[0] == "florence-fast"
        done = subprocess.run([sys.executable, "-m", "florence_fast", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    assert (tmp_path / "found" / "contact_sheet.html").is_file()


def test_the_page_of_environment_variables_is_the_table():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    for variable in env.VARIABLES:
        assert f"| `{variable.name}` | `{variable.default}` | {variable.meaning} |" in text


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert [name_of(page) for page in PAGES if f": {name_of(page)}" not in navigation] == []


def test_the_drawing_of_window_attention_is_what_its_script_draws():
    names = {"__name__": "drawing", "__file__": str(ROOT / "scripts" / "draw_window_attention.py")}
    exec(compile(Path(names["__file__"]).read_text(encoding="utf-8"), names["__file__"], "exec"), names)
    assert names["TARGET"].read_text(encoding="utf-8") == names["figure"]()
