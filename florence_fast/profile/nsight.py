"""The command lines of NVIDIA's two profilers around ``florence-fast profile --bare``; nothing here needs torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

_CAPTURE = ("--capture-range=cudaProfilerApi", "--capture-range-end=stop")


def nsys_command(out: Path, options: Sequence[str]) -> list[str]:
    """Return the command that draws the time line of the measured steps: ranges, launches, kernels, copies.

    Args:
        out: folder of the report, ``nsys.nsys-rep``.
        options: of ``florence-fast profile``.
    """
    watch = ("--trace=cuda,nvtx,osrt,cublas,cudnn", "--sample=none", "--cpuctxsw=none", *_CAPTURE)
    return ["nsys", "profile", *watch, "--force-overwrite=true", f"--output={out / 'nsys'}", *_bare(options)]


def ncu_command(out: Path, options: Sequence[str], kernel: str) -> list[str]:
    """Return the command that measures one launch of one kernel with every counter of ``--set full``.

    Args:
        out: folder of the report, ``ncu.ncu-rep``.
        options: of ``florence-fast profile``.
        kernel: a regular expression; the first launch in the measured steps whose name it matches is taken.
    """
    chosen = ("--kernel-name", f"regex:{kernel}", "--launch-count", "1", "--profile-from-start", "off")
    report = ("--force-overwrite", "--export", str(out / "ncu"))
    return ["ncu", "--set", "full", "--nvtx", *chosen, *report, *_bare(options)]


def _bare(options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "florence_fast", "profile", *options, "--bare"]
