"""Small images, shards and sources that the tests of the data share."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from florence_fast.data.pairs import PairSource, PairText


def encode(colour: tuple[int, ...], size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image of one colour, as a file's bytes."""
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these members, gzipped where the name says so."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, text: str, colour: tuple[int, int, int] = (1, 2, 3), **more: object) -> dict[str, bytes]:
    """The members of one key of a shard."""
    return {f"{key}.png": encode(colour), f"{key}.json": json.dumps({"text": text, **more}).encode()}


class ListPairs(PairSource):
    """Pairs in memory: image i is of one colour made from i; chosen ones fail in their image or their text."""

    def __init__(self, texts: list[PairText], bad_images: set[int] = frozenset(), bad_texts: set[int] = frozenset()):
        self.pairs, self.bad_images, self.bad_texts, self.decoded = texts, bad_images, bad_texts, []

    def __len__(self) -> int:
        return len(self.pairs)

    def texts(self, index: int) -> PairText:
        if index in self.bad_texts:
            raise ValueError("no text here")
        return self.pairs[index]

    def image(self, index: int) -> Image.Image:
        self.decoded.append(index)
        if index in self.bad_images:
            raise ValueError("no image here")
        image = Image.new("RGB", (16, 12), (index % 256, 255 - index % 256, 7))
        image.paste((255, 255, 255), (0, 0, 8, 6))
        return image

    def describe(self, index: int) -> str:
        return f"list[{index}]"


@pytest.fixture
def list_pairs() -> Callable[..., ListPairs]:
    """Build a source of ``count`` pairs with ``names`` texts, each with a short name and two keywords."""

    def build(count: int = 40, names: int = 40, **bad: set[int]) -> ListPairs:
        texts = [
            PairText(f"Name {i % names}", f"Short {i % names}", [f"key {i % names}", "shared"]) for i in range(count)
        ]
        return ListPairs(texts, **bad)

    return build
