"""How each kernel is launched: warps, stages and programs, from tables that measurement writes.

A table is a file ``sm_<arch>.json`` beside this one: ``{"<kernel>": {"<dtype>/n<tokens>/d<head dim>": {...}}}``, as
``python -m bench.gpu.tune`` writes it. Inside ``measured(...)`` another table of this form takes precedence. What no
table knows runs with the default that the kernel gives.
"""

import functools
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Config:
    """Launch options of one kernel; ``programs_per_sm`` is how many of its programs share a multiprocessor."""

    num_warps: int = 4
    num_stages: int = 2
    programs_per_sm: int = 2
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return what goes into the launch beside the kernel's arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


class Request(NamedTuple):
    """What a launcher asked for: a kernel on an architecture, the key of its dtype and shape, and its own default."""

    kernel: str
    arch: int
    key: str
    default: Config


Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Kernel -> key of dtype and shape -> fields of a ``Config``."""

_forced: list[tuple[str, Config]] = []
_watches: list[list[Request]] = []


class _Thread(threading.local):
    """What holds for the launches of one thread alone."""

    def __init__(self) -> None:
        self.forced: list[tuple[str, Config]] = []
        self.watches: list[list[Request]] = []
        self.tables: list[Table] = []


_thread = _Thread()


def config_of(kernel: str, arch: int, dtype: torch.dtype, tokens: int, head_dim: int, default: Config) -> Config:
    """Return the measured configuration of ``kernel`` for this architecture, dtype and shape, or ``default``."""
    request = Request(kernel, arch, f"{str(dtype).removeprefix('torch.')}/n{tokens}/d{head_dim}", default)
    for watch in (*_watches, *_thread.watches):
        watch.append(request)
    for name, config in reversed((*_forced, *_thread.forced)):
        if name == kernel:
            return config
    return usual(request)


def usual(request: Request) -> Config:
    """Return what the tables answer to a request, or else its default, whatever is forced."""
    found: Mapping[str, Any] = {}
    for table in (_table(request.arch), *_thread.tables):
        found = table.get(request.kernel, {}).get(request.key, found)
    return replace(request.default, **found)


@contextmanager
def forced(kernel: str, config: Config, *, this_thread: bool = False) -> Iterator[None]:
    """Launch ``kernel`` with ``config`` inside, whatever table and default say; the innermost one counts.

    The setting belongs to the process: autograd runs a backward on CUDA in a thread of its own. With ``this_thread``
    no other thread sees it, and it wins.

    Raises:
        TypeError: ``config`` is no ``Config``.

    >>> with forced("layer_norm_fwd", Config(num_warps=8)):
    ...     out = layer_norm_fwd(x, ...)
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {type(config).__name__}")
    with _last(_thread.forced if this_thread else _forced, (kernel, config)):
        yield


@contextmanager
def watched(*, this_thread: bool = False) -> Iterator[list[Request]]:
    """Collect what launchers ask for inside, in order, each time anew; of this thread alone, or of all."""
    requests: list[Request] = []
    with _last(_thread.watches if this_thread else _watches, requests):
        yield requests


@contextmanager
def measured(table: Table) -> Iterator[None]:
    """Let ``table`` answer before those of the package, for the launches of this thread."""
    with _last(_thread.tables, table):
        yield


@contextmanager
def _last(settings: list[Any], one: Any) -> Iterator[None]:
    """Put ``one`` at the end of ``settings`` inside."""
    settings.append(one)
    try:
        yield
    finally:
        # By identity, from the end: two watches that saw nothing are equal, and threads end in any order.
        del settings[max(i for i, other in enumerate(settings) if other is one)]


def table_path(arch: int) -> Path:
    """Return where the table of an architecture lies, whether or not there is one."""
    return Path(__file__).with_name(f"sm_{arch}.json")


def forget_tables() -> None:
    """Read the tables anew at the next launch: one of them has been written."""
    _table.cache_clear()


@functools.cache
def _table(arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    path = table_path(arch)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
