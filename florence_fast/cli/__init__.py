"""The command line ``florence-fast``: thin commands over the Python surface.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated (128 plus the number of the signal, as
shells have it). Wrong usage and failures are one line each (failures.py); ``--debug`` or FLORENCE_FAST_DEBUG=1
prints the traceback before it. Modules that need torch are imported by the
commands that use them, so ``--help`` answers at once.
"""

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from signal import SIGTERM
from types import FrameType
from typing import Annotated

import typer

from florence_fast import env
from florence_fast.build_failure import build_failure
from florence_fast.cli import (
    convert,
    demo,
    evaluate,
    export,
    info,
    predict,
    profile,
    search,
    train,
    verify,
    warmup,
)
from florence_fast.cli.environment import check_environment
from florence_fast.cli.failures import explain
from florence_fast.version import __version__

NAME = "florence-fast"
_ENDED = {129: ("hung up", 129), 130: ("interrupted", 130), 143: ("terminated", 143)}
DEBUG = "--debug"

app = typer.Typer(name=NAME, add_completion=False, rich_markup_mode=None)
app.command("demo")(demo.command)
app.add_typer(train.commands, name="train")
app.add_typer(evaluate.commands, name="evaluate")
app.command("predict")(predict.command)
app.command("search")(search.command)
app.command("convert")(convert.command)
app.command("export")(export.command)
app.command("info")(info.command)
app.command("verify")(verify.command)
app.command("profile")(profile.command)
app.command("warmup")(warmup.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Print the traceback of an error, for a bug report; works behind commands too.")
    ] = False,
) -> None:
    """Florence (2021), the vision foundation model: train it, measure it, search with it."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``args`` are the process's own by default."""
    args = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in args or env.read("FLORENCE_FAST_DEBUG") == "1"
    args = [arg for arg in args if arg != DEBUG]
    _let_every_name_be_shown()
    _say_that_kernels_are_absent(args)
    try:
        with _terminable():
            return _run(args, debug)
    except _Terminated:
        return _complain(*_ENDED[143])
    finally:
        _let_go_of_closed_streams()


def _say_that_kernels_are_absent(args: list[str]) -> None:
    """Print one line before a command whose kernels an installation failed to build; `info` says it by itself."""
    failure = build_failure()
    if failure and args and not args[0].startswith("-") and args[0] != "info" and "--help" not in args:
        print(f"note: the native kernels were not built ({failure}), so that models run slower here", file=sys.stderr)


def _run(args: list[str], debug: bool) -> int:
    try:
        check_environment(args)
        code = typer.main.get_command(app).main(args or ["--help"], prog_name=NAME, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(*_ENDED[130])
    except Exception as error:
        explained = explain(error, NAME)
        if explained is None:
            raise
        if debug:
            traceback.print_exc()
        return _complain(*explained)
    # The parser turns Ctrl-C into its code itself, without a word.
    return _complain(*_ENDED[code]) if code in _ENDED else code or 0


class _Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: temporary files are removed, and a container's first process ends.

    Training has a handler of its own meanwhile, which saves. A handler of the program that called us stays.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _let_every_name_be_shown() -> None:
    """Escape what a terminal's encoding lacks: a name that it cannot show must not end a command after its work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _let_go_of_closed_streams() -> None:
    """Send what nobody can read any more to nowhere, or Python would fail with it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _complain(message: str, code: int) -> int:
    with suppress(BrokenPipeError):
        print(f"{NAME}: {message}", file=sys.stderr)
    return code
