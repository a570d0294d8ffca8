"""The table of launch configurations that FLORENCE_FAST_AUTOTUNE has measured here, in a file of the user's cache.

One file for each kind of device, kernels and versions, in ``<cache>/configs``: what another device, Triton or source
has measured has another name and is never read. Processes may write at the same time.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from florence_fast import env
from florence_fast.files import write_json
from florence_fast.kernels.configs import Config
from florence_fast.kernels.targets import target_of
from florence_fast.provenance import kernel_sources
from florence_fast.strict_json import format_json
from florence_fast.text_files import read_json

Entries = dict[str, dict[str, dict[str, Any]]]


class MeasuredConfigs:
    """Kernel -> key -> fields of a ``Config``, as the file had it, with what this process has added."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self._facts = path, facts
        self._told: set[str] = set()
        self.table = self._read()

    def add(self, kernel: str, key: str, config: Config) -> None:
        """Keep a winner, in the file and here; if another process was first, take what it has found."""
        self.table.setdefault(kernel, {})[key] = asdict(config)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                for name, entries in self._read().items():
                    self.table[name] = self.table.get(name, {}) | entries
                write_json(self.path, {**self._facts, "table": self.table})
        except OSError as error:
            self._tell(f"launch configurations are kept for this process alone: {self.path} cannot be written: {error}")

    def _read(self) -> Entries:
        """Return what the file holds; nothing, with a warning, if that is no table."""
        try:
            found = read_json(self.path)["table"]
            return {kernel: {key: _checked(entry) for key, entry in keys.items()} for kernel, keys in found.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            self._tell(f"{self.path} holds no table of launch configurations and is passed over: {error!r}")
            return {}

    def _tell(self, what: str) -> None:
        """Warn, once a process of each thing."""
        about = what.split(":", 1)[0]
        if about not in self._told:
            self._told.add(about)
            warnings.warn(what, RuntimeWarning, stacklevel=2)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return all fields of a configuration.

    Raises:
        TypeError: it has others, or they are no numbers.
        ValueError: a number is below 1.
    """
    fields = asdict(Config(**entry))
    for name, value in fields.items():
        if type(value) is not int and not (name == "maxnreg" and value is None):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return fields


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out, where the file system has locks; without them the last writer wins."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


_known: dict[tuple[str, torch.device], MeasuredConfigs] = {}


def measured_configs(device: torch.device) -> MeasuredConfigs:
    """Return what is measured on the device, from the folder that FLORENCE_FAST_CACHE_DIR names now."""
    folder = env.read("FLORENCE_FAST_CACHE_DIR")
    if (folder, device) not in _known:
        facts = facts_of(device)
        words = re.sub(r"\W+", "_", facts["device"].lower()).strip("_")
        digest = hashlib.sha256(format_json(facts, sort_keys=True).encode()).hexdigest()[:12]
        path = Path(folder).expanduser() / "configs" / f"{words}-{digest}.json"
        _known.setdefault((folder, device), MeasuredConfigs(path, facts))
    return _known[folder, device]


def facts_of(device: torch.device) -> dict[str, Any]:
    """Return what a measurement holds for: the device, and the sources and versions that ``kernel_sources`` joins."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, **asdict(target_of(device)), "sources": kernel_sources()}
