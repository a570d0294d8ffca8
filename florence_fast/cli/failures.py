"""Map a command's error to one line and an exit code, or to a traceback where it is a bug.

Wrong usage exits with 2, a failure with 1. An error with which a function of ours refuses its arguments is wrong
usage, wherever it comes from, since the arguments of commands are the user's. The same kind of error raised by another
library is a failure. Other kinds are faults of the program: they keep their traceback, which a bug report needs.
"""

from pathlib import Path
from typing import Any

from florence_fast import env
from florence_fast.cli.usage import REFUSALS, WrongUsage
from florence_fast.printable import printable

PACKAGE = Path(__file__).parents[1]
BACKEND = "FLORENCE_FAST_BACKEND"
DISPATCH = "ops/dispatch.py"
HINT = "--debug shows where"


def explain(error: Exception, name: str) -> tuple[str, int] | None:
    """Return one line and the exit code for an error, or None where only its traceback says what happened.

    Args:
        error: what a command raised.
        name: of the program.
    """
    if (format_message := getattr(error, "format_message", None)) is not None:  # of the option parser
        context = getattr(error, "ctx", None)
        path = context.command_path if context else name
        return f"{_line(format_message())} (see '{path} --help')", getattr(error, "exit_code", 2)
    if isinstance(error, WrongUsage):
        return _line(error), 2
    if _is_out_of_memory(error):
        return f"failed: not enough memory: {_line(error)}", 1
    if isinstance(error, OSError) or type(error).__module__.startswith("florence_fast."):
        return f"failed: {_line(error)}", 1
    if isinstance(error, RuntimeError) and env.read(BACKEND) != "auto" and _raised_in(error).endswith(DISPATCH):
        return f"{BACKEND}={env.read(BACKEND)}: {_line(error)}", 2
    if isinstance(error, REFUSALS) and _is_ours(error):
        return _line(error), 2
    if isinstance(error, (*REFUSALS, RuntimeError)):
        return f"failed: {type(error).__name__}: {_line(error)} ({HINT})", 1
    return None


def _is_ours(error: Exception) -> bool:
    """Say whether a function of this package raised it."""
    return Path(_raised_in(error)).is_relative_to(PACKAGE)


def _raised_in(error: Exception) -> str:
    """Return the file whose code raised it, or an empty str for one that was never raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out, on the device or here; PyTorch's allocator for CPUs has no class for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _line(message: Any) -> str:
    """The message on one line, with nothing in it that acts on a terminal."""
    return printable(" ".join(str(message).split())) or type(message).__name__
