"""Provenance of a result: command, commit, versions, machine and date. Every recorded result carries it."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from florence_fast.version import __version__

CHECKOUT = Path(__file__).parents[1]


def provenance() -> dict[str, Any]:
    """Return the entries that a result's JSON carries beside its figures."""
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(["florence-fast", *sys.argv[1:]]),
        "commit": checkout_commit(),
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }


@functools.cache
def kernel_sources() -> str:
    """Return a digest of what decides how fast a kernel is: its source, and the versions that compile it."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    digest = hashlib.sha256(f"{torch.__version__} {triton}".encode())
    spec = importlib.util.find_spec("florence_fast.kernels")
    assert spec is not None and spec.origin is not None, "the package lacks its kernels"
    folder = Path(spec.origin).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def checkout_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, ``+`` behind it where files differ from it.

    None for an installation without a checkout, or without git.
    """
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.strip()
