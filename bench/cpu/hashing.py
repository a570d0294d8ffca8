"""Hashing and near-duplicates beside their definitions and other libraries: ``python -m bench.cpu.hashing``.

Competitors take turns on one thread; faiss and ImageHash are rows with their reason where they are not installed. The
figures are printed and kept in ``bench/results/hashing.json``.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.cpu.rows.base import CPU
from bench.machine import facts
from florence_fast import native
from florence_fast.data import dhash, near_duplicates, phash
from florence_fast.data.labels import text_label, text_labels
from florence_fast.files import write_json
from florence_fast.timing import time_calls

RESULTS = Path(__file__).parents[1] / "results"
Call = Callable[[], Any]


def main(args: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.hashing", description=__doc__.splitlines()[0])
    parser.add_argument("--hashes", type=int, default=1_000_000, help="how many to search (1,000,000)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    options = parser.parse_args(args)
    rows = []
    for work, calls in works(options.hashes).items():
        present = {name: [call] for name, call in calls.items() if not isinstance(call, str)}
        times = {name: time.median for name, time in time_calls(present, CPU, 0.3, least_turns=5).items()}
        rows.append({"work": work, "times": times, "missing": {n: c for n, c in calls.items() if isinstance(c, str)}})
        shown = " · ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in times.items())
        print(f"{work}: {shown}", *(f"{name}: {call}" for name, call in rows[-1]["missing"].items()), sep=" · ")
    write_json(options.out / "hashing.json", {**facts(CPU), "threads": 1, "rows": rows})
    return 0


def works(count: int) -> dict[str, dict[str, Call | str]]:
    """Return each work: name of a competitor -> its call, or why it cannot take part."""
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    copies = count // 100
    hashes[-copies:] = hashes[:copies] ^ (np.uint64(1) << random.integers(0, 64, copies, dtype=np.uint64))
    found: dict[str, dict[str, Call | str]] = {
        f"near_duplicates, {count:,} hashes, distance 3": {
            "ours": lambda: near_duplicates(hashes, 3, threads=1),
            "faiss": _faiss(hashes),
        }
    }
    for height, width in ((64, 64), (480, 640)):
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for function in (dhash, phash):
            found[f"{function.__name__}, {width} x {height}"] = {
                "ours": lambda function=function, image=image: function(image, threads=1),
                "NumPy": _without_extension(lambda function=function, image=image: function(image)),
                "ImageHash": _image_hash(function.__name__, image),
            }
    texts = [f"a photo of number {number} taken on a rainy day in town" for number in range(20_000)]
    found["text labels, 20,000 captions"] = {
        "ours": lambda: text_labels(texts, threads=1),
        "hashlib": lambda: (text_label.cache_clear(), [text_label(text) for text in texts]),
    }
    return found


def _without_extension(call: Call) -> Call:
    def run() -> Any:
        with mock.patch.object(native, "extension", return_value=None):
            return call()

    return run


def _faiss(hashes: np.ndarray) -> Call | str:
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed"
    import faiss

    rows = hashes.view(np.uint8).reshape(-1, 8)

    def search() -> Any:
        faiss.omp_set_num_threads(1)
        index = faiss.IndexBinaryMultiHash(64, 4, 16)
        index.add(rows)
        return index.range_search(rows, 4)  # distances below 4

    return search


def _image_hash(name: str, pixels: np.ndarray) -> Call | str:
    if importlib.util.find_spec("imagehash") is None:
        return "ImageHash is not installed"
    import imagehash
    from PIL import Image

    image = Image.fromarray(pixels)
    return lambda: getattr(imagehash, name)(image)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
