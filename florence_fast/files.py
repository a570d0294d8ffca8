"""Atomic file writes: a file appears whole or not at all."""

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from florence_fast.strict_json import format_json

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; sync the file and rename it over ``path``, or remove it on an error.

    Whatever goes wrong, ``path`` holds what it held before, and nothing unfinished stays behind. The file to write
    has the name of ``path``, in a new folder ``path.*.tmp`` beside it that only this process can write to, so no link
    that somebody else made is followed, and whatever a library leaves there goes with the folder. The mode is the one
    of any new file under the process's umask, whatever the writer chose.

    Raises:
        OSError: the file cannot be written; it names ``path``, also where the library that wrote reports a full disk
            as an error of its own.
    """
    if path.exists() and not path.is_file():
        number = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(number, "not a file that can be replaced", str(path))
    outer = sys.exc_info()[1]
    beside = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name[:40]}.", suffix=".tmp", dir=path.parent))
        beside = folder / path.name
        mode = _mode_of_a_new_file(folder)
        yield beside
        if stat.S_IMODE(beside.stat().st_mode) != mode:
            beside.chmod(mode)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except Exception as error:
        number = _errno_behind(error, outer, beside)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside.parent, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what killed writers left in ``folder``, and return the paths.

    These are the folders of `replacing`, and files of its earlier versions and of safetensors.
    """
    found = sorted([*folder.glob("*.tmp"), *folder.glob(".tmp??????")])
    for leftover in found:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return found


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path``, whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        # A name that is not UTF-8 is a lone surrogate in Python: escaped, it costs nobody the file.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON, as ``write_text`` does; NaN and infinities become null."""
    return write_text(path, format_json(value, indent=2) + "\n")


def _mode_of_a_new_file(folder: Path) -> int:
    """Return the mode of a file that is made in ``folder``: the umask can only be read by changing it."""
    probe = folder / "mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def _errno_behind(error: BaseException | None, outer: BaseException | None, beside: Path | None) -> int | None:
    """Find the operating system's error that made a writer fail; None where there was none, or it names another file.

    torch raises its own error while it handles ours, safetensors writes the number into its message. ``outer`` was
    being handled before the writing began.
    """
    while error is not None and error is not outer:
        if isinstance(error, OSError) and error.errno is not None:
            ours = error.filename is None or beside is None or str(error.filename) == str(beside)
            return error.errno if ours else None
        if match := _RUST_ERROR.search(str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
