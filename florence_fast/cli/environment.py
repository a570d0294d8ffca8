"""The environment variables of the package, looked at before a command does anything: a bad value is wrong usage."""

from collections.abc import Sequence

from florence_fast import env
from florence_fast.errors import unknown

SWITCHES = ("FLORENCE_FAST_AUTOTUNE", "FLORENCE_FAST_DEBUG", "FLORENCE_FAST_NVTX")


def check_environment(args: Sequence[str]) -> None:
    """Refuse values that no command can work with; ``--help`` and ``--version`` are answered whatever they are.

    Args:
        args: of the command line; nothing is checked where they name no command.

    Raises:
        ValueError: a variable holds an unknown word, or names instructions that do not run on this processor.
    """
    if not args or args[0].startswith("-") or "--help" in args:
        return
    for name in SWITCHES:
        if env.read(name) not in ("0", "1"):
            raise unknown(name, env.read(name), ("0", "1"))
    # both import torch, which takes seconds
    if env.read("FLORENCE_FAST_BACKEND") != "auto":
        from florence_fast.ops.dispatch import backend_in_force

        backend_in_force()
    if env.read("FLORENCE_FAST_CPU") != "auto":
        _check_level()


def _check_level() -> None:
    from florence_fast import native

    try:
        native.level()
    except RuntimeError as error:
        # without the extension the variable decides nothing
        if native.levels():
            raise ValueError(str(error)) from error
