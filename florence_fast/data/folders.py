"""Pairs that lie in a folder: each picture with a text file of its name, or in the folder of its class."""

from pathlib import Path

from PIL import Image

from florence_fast.data.pairs import PairSource, PairText
from florence_fast.data.pictures import SUFFIXES, open_picture


class FolderPairs(PairSource):
    """All pictures below a folder, sorted by path.

    The text of ``NAME.jpg`` is ``NAME.txt`` where that exists, and otherwise the name of the picture's folder
    directly below the root, with blanks for its ``_`` and ``-``: ``red_apple/17.jpg`` is a "red apple".

    Raises:
        ValueError: there is no picture, or none of them has a text.
    """

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        files = sorted(path for path in folder.rglob("*") if not self._is_hidden(path) and path.is_file())
        self.pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
        self._captions = {path.with_suffix("") for path in files if path.suffix == ".txt"}
        if not self.pictures:
            raise ValueError(f"{folder} holds no picture; known are {', '.join(sorted(SUFFIXES))}")
        if all(path.parent == folder and path.with_suffix("") not in self._captions for path in self.pictures):
            raise ValueError(
                f"none of the {len(self.pictures)} pictures in {folder} has a text: wanted NAME.txt beside NAME.jpg, "
                "or the pictures of a class in a folder of its name"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def texts(self, index: int) -> PairText:
        """Text of picture ``index``."""
        path = self.pictures[index]
        if path.with_suffix("") in self._captions:
            text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        elif path.parent != self.folder:
            text = " ".join(path.relative_to(self.folder).parts[0].replace("_", " ").replace("-", " ").split())
        else:
            raise ValueError(f"no {path.stem}.txt beside it")
        if not text:
            raise ValueError("its text is empty")
        return PairText(text)

    def image(self, index: int) -> Image.Image:
        """Picture ``index``."""
        return open_picture(self.pictures[index], self.max_pixels)

    def describe(self, index: int) -> str:
        """Path of picture ``index``."""
        return str(self.pictures[index])

    def _is_hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.folder).parts)
