"""``florence-fast budget``: hold the compiled kernels against the floors that memory sets, without a GPU."""

import subprocess
import sys
from pathlib import Path

import typer

from florence_fast.cli.usage import WrongUsage

CHECKOUT = Path(__file__).parents[2]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""The command's context settings: every option is for ``python -m bench.budget``."""

# Run as a module of the checkout, wherever the user stands; paths that the user gives stay relative to that.
_RUN = "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('bench.budget', run_name='__main__')"


def command(context: typer.Context) -> None:
    """Compile the kernels for A100 and H100 and hold them to limits.

    It needs a checkout of the repository. Options: --check exits 1 if a rule is broken; --full takes every case;
    --case SUBSTRING takes some; --json PATH and --charts DIR write; --triton-36 DIR says where a second Triton lies
    and --require-both insists on it.
    """
    if not (CHECKOUT / "bench" / "budget.py").is_file():
        raise WrongUsage("budget needs a checkout of the repository, and this is an installation without one")
    done = subprocess.run([sys.executable, "-c", _RUN, str(CHECKOUT), *context.args], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
