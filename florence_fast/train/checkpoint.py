"""Atomic checkpoints: written to a temporary file, synced, renamed, and verified by their digest before use.

``step_K.pt`` holds everything that a run needs to go on, ``step_K.pt.sha256`` its digest (``sha256sum -c`` reads it),
``step_K.safetensors`` the weights alone, and ``latest`` the name of the checkpoint that was written last.
"""

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from florence_fast.files import remove_leftovers, replacing, write_text

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.pt")
_BLOCK = 1 << 20


class CorruptCheckpointError(RuntimeError):
    """A checkpoint is not what was written: cut short, altered, or without its digest."""


class CheckpointStore:
    """The checkpoints of one run in one folder.

    Args:
        folder: created when the first checkpoint is saved.
        keep: how many valid checkpoints stay; older ones are removed.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._verified: dict[Path, tuple[int, int]] = {}

    def path(self, step: int) -> Path:
        """Return where the checkpoint of ``step`` lies, or would lie."""
        return self.folder / f"step_{step}.pt"

    def save(self, step: int, state: dict[str, Any], write_weights: Callable[[Path], None] | None = None) -> Path:
        """Write the checkpoint of ``step`` and remove those that are no longer kept.

        The order makes any moment safe to die in: the digest comes first, so a file under its final name always has
        one; the pointer comes after the file; older checkpoints go last.

        Args:
            step: optimiser steps taken.
            state: tensors and plain values, as ``torch.load(weights_only=True)`` accepts.
            write_weights: writes the weights, as safetensors, to the path that it is given.

        Returns:
            The path of ``step_K.pt``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        with replacing(path) as beside:
            with open(beside, "wb") as file:
                hashing = _HashingFile(file)
                torch.save(state, cast(IO[bytes], hashing))
            write_text(_sidecar(path), f"{hashing.digest.hexdigest()}  {path.name}\n")
        self._verified[path] = _stamp(path)
        if write_weights is not None:
            with replacing(path.with_suffix(".safetensors")) as beside:
                write_weights(beside)
        write_text(self.folder / "latest", path.name + "\n")
        self._remove_old(step)
        return path

    def latest_valid(self, check: Callable[[Path], None] = lambda path: None) -> Path | None:
        """Return the newest checkpoint that is whole, or None where there is none at all.

        The one that ``latest`` points to comes first, then earlier ones, then later ones (left by a course of the run
        that was given up by resuming from an earlier step). Every one that is passed over is named in the log.

        Args:
            check: raises `CorruptCheckpointError` for a checkpoint that is whole and still of no use.

        Raises:
            CorruptCheckpointError: there are checkpoints and none of them is whole.
        """
        pointed = self._pointed_step()
        candidates = sorted(
            self._all(), key=lambda path: (pointed is None or _step_of(path) <= pointed, _step_of(path)), reverse=True
        )
        for path in candidates:
            try:
                self.verify(path)
                check(path)
            except (CorruptCheckpointError, OSError) as error:
                logger.warning("passed over: %s", error)
            else:
                return path
        if candidates:
            raise CorruptCheckpointError(f"none of the {len(candidates)} checkpoints in {self.folder} is whole")
        return None

    def verify(self, path: Path) -> None:
        """Compare a checkpoint with its digest.

        Raises:
            CorruptCheckpointError: the digest is missing or differs; the file is named.
        """
        if self._verified.get(path) == _stamp(path):
            return
        if not _sidecar(path).is_file():
            raise CorruptCheckpointError(f"checkpoint {path} has no digest {_sidecar(path).name}")
        wanted = _sidecar(path).read_bytes().split()[:1]
        if wanted != [_digest(path).encode()]:
            raise CorruptCheckpointError(f"checkpoint {path} is corrupt: {_sidecar(path).name} holds another SHA-256")
        self._verified[path] = _stamp(path)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Verify and read a checkpoint, onto the CPU; nothing but tensors and plain values is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpointError: the file is not what was written, or holds other objects than that.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        self.verify(path)
        return _read(path)

    def model_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the entry "model" of a checkpoint, mapped and not read: nothing else of the file is touched."""
        found = _read(path, mmap=True)
        model = found.get("model") if isinstance(found, dict) else None
        return model if isinstance(model, dict) else {}

    def remove_leftovers(self) -> None:
        """Delete what a killed writer left beside the checkpoints."""
        for leftover in remove_leftovers(self.folder):
            logger.info("removed %s, which was never finished", leftover)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]

    def _pointed_step(self) -> int | None:
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        name = pointer.read_bytes().decode("utf-8", "replace").strip()
        match = _NAME.fullmatch(name)
        if match and (self.folder / name).is_file():
            return int(match[1])
        logger.warning("%s names no checkpoint of this folder (%.40r): the newest whole one is taken", pointer, name)
        return None

    def _remove_old(self, step: int) -> None:
        """Remove everything older than the oldest of the ``keep`` newest valid checkpoints up to ``step``."""
        valid = 0
        for path in sorted(self._all(), key=_step_of, reverse=True):
            if _step_of(path) > step:
                continue
            if valid == self.keep:
                for file in (path, _sidecar(path), path.with_suffix(".safetensors")):
                    file.unlink(missing_ok=True)
                self._verified.pop(path, None)
                continue
            try:
                self.verify(path)
                valid += 1
            except CorruptCheckpointError as error:
                logger.warning("not counted among the %d checkpoints to keep: %s", self.keep, error)


class _HashingFile:
    """A binary file for writing that hashes what passes through, so that the digest is of what was meant."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _read(path: Path, **options: Any) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of last change: what a verified file is recognised by."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is no checkpoint"
    return int(found[1])
