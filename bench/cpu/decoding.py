"""From a JPEG to what a model reads, beside other decoders and resizers: ``python -m bench.cpu.decoding``.

Photographs that come with scikit-image are brought to three sizes and saved as JPEG (quality 90), so the files are
realistic and nothing is downloaded. Competitors take turns on one thread. Each row also says how far the values lie
from those of Pillow alone, which is what torchvision's and open_clip's transforms compute. simplejpeg is a row with its
reason where it is not installed. The figures are printed and kept in ``bench/results/decoding.json``.
"""

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.cpu.rows.base import CPU
from bench.machine import facts
from florence_fast.data.images import open_image
from florence_fast.data.resizing import fit
from florence_fast.files import write_json
from florence_fast.timing import time_calls

RESULTS = Path(__file__).parents[1] / "results"
SIDES = (375, 720, 1500)  # shorter sides, in pixels: of the web's images, of videos, of small cameras
SIZE = 224
PHOTOGRAPHS = (
    *("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png"),
    "retina.jpg",
)
Load = Callable[[bytes], np.ndarray]


def main(args: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="shorter sides of the JPEGs, in pixels")
    options = parser.parse_args(args)
    try:
        images = photographs()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = [measure(side, [jpeg(image, side) for image in images]) for side in options.sides]
    for row in rows:
        print(f"shorter side {row['side']}, to {SIZE} x {SIZE}, one thread:")
        for name, found in row["loaders"].items():
            print(
                f"  {name:28} {found['images_per_second']:7.0f} images/s · {found['ratio']:.2f} times Pillow's speed · "
                f"values differ by {found['mean_difference']:.3f} on average, {found['largest_difference']} at most"
            )
        for name, reason in row["missing"].items():
            print(f"  {name:28} missing: {reason}")
    write_json(options.out / "decoding.json", {**facts(CPU), "threads": 1, "size": SIZE, "rows": rows})
    return 0


def photographs() -> list[Image.Image]:
    """The photographs of an installed scikit-image, which itself is not imported."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise FileNotFoundError(
            "bench.cpu.decoding reads the photographs of scikit-image: pip install --no-deps scikit-image"
        )
    return [Image.open(Path(spec.origin).parent / "data" / name).convert("RGB") for name in PHOTOGRAPHS]


def jpeg(image: Image.Image, side: int) -> bytes:
    """Save an image as JPEG, ``side`` pixels high or wide, whichever is less."""
    scale, out = side / min(image.size), io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(out, "JPEG", quality=90)
    return out.getvalue()


def measure(side: int, files: list[bytes]) -> dict[str, Any]:
    """Time all loaders on the files of one size, and compare their values with Pillow's."""
    present = {name: load for name, load in LOADERS.items() if not isinstance(load, str)}
    calls = {name: [lambda load=load: [load(file) for file in files]] for name, load in present.items()}
    seconds = {name: time.median / len(files) for name, time in time_calls(calls, CPU, 0.3, least_turns=5).items()}
    reference = [present["Pillow"](file).astype(int) for file in files]
    found = {}
    for name, load in present.items():
        differences = [np.abs(load(file) - wanted) for file, wanted in zip(files, reference, strict=True)]
        found[name] = {
            "images_per_second": 1 / seconds[name],
            "ratio": seconds["Pillow"] / seconds[name],
            "largest_difference": int(max(difference.max() for difference in differences)),
            "mean_difference": float(np.mean([difference.mean() for difference in differences])),
        }
    return {"side": side, "loaders": found, "missing": {n: why for n, why in LOADERS.items() if isinstance(why, str)}}


def ours(file: bytes) -> np.ndarray:
    """What the loader and the transforms of this package do."""
    return fit(open_image(file), (SIZE, SIZE), "shortest", "bicubic")


def pillow(file: bytes) -> np.ndarray:
    """Pillow alone: Resize and CenterCrop."""
    return _middle(Image.open(io.BytesIO(file)))


def pillow_draft(file: bytes) -> np.ndarray:
    """Pillow, decoding at a half, a quarter or an eighth where three times the wanted side are left."""
    image = Image.open(io.BytesIO(file))
    scale = 3 * SIZE / min(image.size)
    image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
    return _middle(image)


def _middle(image: Image.Image) -> np.ndarray:
    scale = SIZE / min(image.size)
    image = image.resize((int(image.width * scale + 1e-6), int(image.height * scale + 1e-6)), Image.Resampling.BICUBIC)
    left, top = round((image.width - SIZE) / 2), round((image.height - SIZE) / 2)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def _simplejpeg() -> Load | str:
    """simplejpeg's exact decoder and torch's resizing, with no PIL image between them."""
    if importlib.util.find_spec("simplejpeg") is None:
        return "simplejpeg is not installed"
    import simplejpeg

    def load(file: bytes) -> np.ndarray:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(file, "RGB", fastdct=False, fastupsample=False))
        scale = SIZE / min(pixels.shape[:2])
        size = [int(side * scale + 1e-6) for side in pixels.shape[:2]]
        resized = F.interpolate(pixels.permute(2, 0, 1).unsqueeze(0), size, mode="bicubic", antialias=True)[0]
        top, left = (round((side - SIZE) / 2) for side in size)
        return resized[:, top : top + SIZE, left : left + SIZE].permute(1, 2, 0).numpy()

    return load


LOADERS: dict[str, Load | str] = {
    "ours": ours,
    "Pillow": pillow,
    "Pillow with draft": pillow_draft,
    "simplejpeg and torch": _simplejpeg(),
}


if __name__ == "__main__":
    raise SystemExit(main())
