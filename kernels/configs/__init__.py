"""How each kernel is launched: warps, stages and programs, from tables that measurement writes.

A table is a file ``sm_<arch>.json`` beside this one: ``{"<kernel>": {"<dtype>/n<tokens>/d<head dim>": {...}}}``, as
``python -m bench.tune`` writes it. What no table knows runs with the default that the kernel gives.
"""

import functools
import json
from collections.abc import Iterator
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


_forced: list[tuple[str, Config]] = []
_watches: list[list[Request]] = []


def config_of(kernel: str, arch: int, dtype: torch.dtype, tokens: int, head_dim: int, default: Config) -> Config:
    """Return the measured configuration of ``kernel`` for this architecture, dtype and shape, or ``default``."""
    key = f"{str(dtype).removeprefix('torch.')}/n{tokens}/d{head_dim}"
    for watch in _watches:
        watch.append(Request(kernel, arch, key, default))
    for name, config in reversed(_forced):
        if name == kernel:
            return config
    return replace(default, **_table(arch).get(kernel, {}).get(key, {}))


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launch ``kernel`` with ``config`` inside, whatever table and default say; the innermost one counts.

    The setting belongs to the process, not to the thread: autograd runs a backward on CUDA in a thread of its own.

    Raises:
        TypeError: ``config`` is no ``Config``.

    >>> with forced("layer_norm_fwd", Config(num_warps=8)):
    ...     out = layer_norm_fwd(x, ...)
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {type(config).__name__}")
    _forced.append((kernel, config))
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def watched() -> Iterator[list[Request]]:
    """Collect what launchers ask for inside, in order, each time anew."""
    requests: list[Request] = []
    _watches.append(requests)
    try:
        yield requests
    finally:
        # By identity: two watches that saw nothing are equal.
        _watches[:] = [watch for watch in _watches if watch is not requests]


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
