"""Draw the demo's images: emoji by seven artists, with their names and Unicode's keywords.

Each npm package below holds SVG bodies by name. Every body is rendered at 64 x 64 on white and stored as
WebP in one WebDataset tar an artist: ``<name>.webp`` beside ``<name>.json`` with ``text`` (the name
in words), ``short_name`` and ``keywords`` (Unicode CLDR). Times, owners and order are fixed, so a second run
writes the same bytes.

    pip install resvg-py==0.5.0 pillow
    python scripts/render_artists.py --out florence_fast/data/artists     # needs `npm` and a registry
"""

import argparse
import gzip
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from glued_names import Speller, compact
from PIL import Image
from tqdm.auto import tqdm

ARTISTS = {
    "emojione": "1.2.3",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
}
ANNOTATIONS = "cldr-annotations-full@48.2.0"
# Sets that map code points to icon names: the bridge from a name to Unicode's keywords.
CODE_POINT_SETS = ("fluent-emoji-flat", "noto")
GLUED_ARTIST = "fxemoji"  # writes a name as one word
FLUENT_SKIN_TONES = ("-light", "-medium-light", "-medium", "-medium-dark", "-dark")
IMAGE_SIZE = 64


def npm_pack(package: str, folder: Path) -> tarfile.TarFile:
    """Download one package with npm and open its archive."""
    command = ["npm", "pack", "--silent", package]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    return tarfile.open(folder / name)


def read_json(archive: tarfile.TarFile, suffix: str) -> dict:
    """Parse the one member whose path ends in ``suffix``."""
    (member,) = [m for m in archive.getmembers() if m.name.endswith(suffix)]
    return json.load(archive.extractfile(member))


def is_base_image(artist: str, name: str) -> bool:
    """Leave out the skin-tone copies of an image."""
    return "skin-tone" not in name and not (artist.startswith("fluent") and name.endswith(FLUENT_SKIN_TONES))


def annotations_by_name(archive: tarfile.TarFile, code_points: list[dict]) -> dict[str, tuple[str, list[str]]]:
    """Map a compact name to Unicode's (short name, keywords)."""
    emoji = read_json(archive, "annotations/en/annotations.json")["annotations"]["annotations"]
    by_character = {
        e.replace("\ufe0f", ""): (a["tts"][0], a.get("default", [])) for e, a in emoji.items() if "tts" in a
    }
    by_name = {compact(short): (short, keywords) for short, keywords in by_character.values()}
    for table in code_points:
        for code, name in table.items():
            character = "".join(chr(int(point, 16)) for point in code.split("-")).replace("\ufe0f", "")
            if character in by_character:
                by_name.setdefault(compact(name), by_character[character])
    return by_name


def render(icons: dict, name: str) -> bytes:
    """One icon as WebP, IMAGE_SIZE square on white, its proportions kept."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    scale = IMAGE_SIZE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size[0], height=size[1])
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas.alpha_composite(image, ((IMAGE_SIZE - image.width) // 2, (IMAGE_SIZE - image.height) // 2))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "WEBP", quality=75, method=6)
    return out.getvalue()


def write_shard(path: Path, samples: list[tuple[str, bytes]]) -> None:
    """A gzipped tar with nothing in it that differs from run to run, under its name only when whole."""
    partial = path.with_name(path.name + ".partial")
    with (
        open(partial, "wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tars")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archives = {a: npm_pack(f"@iconify-json/{a}@{v}", Path(folder)) for a, v in ARTISTS.items()}
        code_points = [read_json(archives[a], "package/chars.json") for a in CODE_POINT_SETS]
        annotations = annotations_by_name(npm_pack(ANNOTATIONS, Path(folder)), code_points)
        icons_of = {artist: read_json(archive, "package/icons.json") for artist, archive in archives.items()}
        names_of = {a: sorted(n for n in icons["icons"] if is_base_image(a, n)) for a, icons in icons_of.items()}
        in_words = [name for artist, names in names_of.items() if artist != GLUED_ARTIST for name in names]
        annotations_words = [words for short, keywords in annotations.values() for words in (short, *keywords)]
        speller = Speller(in_words, annotations_words)
        for artist, icons in icons_of.items():
            samples, annotated, names = [], 0, names_of[artist]
            for name in tqdm(names, desc=artist):
                words = name.replace("-", " ")
                text = {"text": speller.spell(words) if artist == GLUED_ARTIST else words}
                if compact(text["text"]) in annotations:
                    text["short_name"], text["keywords"] = annotations[compact(text["text"])]
                    annotated += 1
                samples += [(f"{name}.json", json.dumps(text).encode()), (f"{name}.webp", render(icons, name))]
            write_shard(out / f"{artist}.tar.gz", samples)
            size = (out / f"{artist}.tar.gz").stat().st_size
            print(f"{artist}: {len(names)} images, {annotated} with keywords, {size:,} bytes")


if __name__ == "__main__":
    main()
