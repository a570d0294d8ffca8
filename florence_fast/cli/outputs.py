"""Check, before any work, that a command's output files and folders can be written."""

import os
import tempfile
from pathlib import Path

from florence_fast.cli.usage import WrongUsage


def check_out_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, or whose place is taken by something else; None is no file.

    Raises:
        WrongUsage: with the option and the reason.
    """
    if path is None:
        return
    if _exists(option, path) and not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe"
        raise WrongUsage(f"{option} {path} {what}, and a file was wanted")
    _check_folder(option, path, path.parent)


def check_out_folder(option: str, path: Path | None) -> None:
    """Refuse a folder that cannot be made or written to; None is no folder.

    Raises:
        WrongUsage: with the option and the reason.
    """
    if path is not None:
        _check_folder(option, path, path)


def _check_folder(option: str, path: Path, folder: Path) -> None:
    """Write a file without a name into ``folder``, or into the one above it that exists already."""
    while not _exists(option, folder):
        folder = folder.parent
    if not folder.is_dir():
        raise WrongUsage(f"{option} {path} cannot be written: {folder} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongUsage(f"{option} {path} cannot be written: {folder}: {error.strerror}") from error


def _exists(option: str, path: Path) -> bool:
    """Say whether there is something, a link that leads nowhere included."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise WrongUsage(f"{option} {str(path)[:80]!r} cannot be written: {error}") from error
    return True
