"""List the files below a folder. Links to folders are followed, and each folder is visited once."""

import os
from pathlib import Path

from florence_fast.data.left_out import LeftOut


def files_below(folder: Path, left_out: LeftOut) -> list[Path]:
    """Return all files below a folder, sorted by path; hidden files and folders are passed over.

    Links are followed, those to folders too. A folder is read once: where it really lies, if that is below ``folder``,
    and otherwise by the first link to it. A link that leads back to a folder around it is not followed.

    Args:
        folder: the folder.
        left_out: counts links that are not followed, broken links, pipes, devices, and folders that cannot be opened.
    """
    return sorted(_Walk(folder, left_out).files(), key=lambda path: path.parts)


class _Walk:
    def __init__(self, folder: Path, left_out: LeftOut) -> None:
        self._root, self._left_out = folder, left_out
        self._seen: set[tuple[int, int]] = set()
        self._links: list[Path] = []

    def files(self) -> list[Path]:
        found = self._read(self._root)
        while self._links:  # after all real folders, so that a link does not take the place of one
            links, self._links = sorted(self._links), []
            for link in links:
                if self._is_new(link):
                    found += self._read(link)
        return found

    def _is_new(self, link: Path) -> bool:
        """Whether a link leads to a folder that is neither around it nor read already."""
        target = os.path.realpath(link)
        around = os.path.realpath(link.parent)
        if os.path.commonpath([target, around]) == target:
            self._left_out.add("links to a folder around them", link.relative_to(self._root))
        elif self._identity(link) in self._seen:
            self._left_out.add("links to folders that are read already", link.relative_to(self._root))
        else:
            return True
        return False

    def _read(self, top: Path) -> list[Path]:
        """Files in ``top`` and the real folders below it; links to folders are kept for later."""
        found, folders = [], [top]
        while folders:
            folder = folders.pop()
            try:
                if (identity := self._identity(folder)) in self._seen:
                    continue
                self._seen.add(identity)
                entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
            except OSError:
                self._left_out.add("folders that cannot be opened", folder.relative_to(self._root))
                continue
            for entry in entries:
                path = folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False):  # known without asking the disk
                    found.append(path)
                elif path.is_dir():
                    self._links.append(path)
                elif path.is_file():
                    found.append(path)
                else:
                    self._left_out.add("broken links, pipes or devices", path.relative_to(self._root))
        return found

    def _identity(self, folder: Path) -> tuple[int, int]:
        found = os.stat(folder)
        return found.st_dev, found.st_ino
