"""Opening pictures: every mode ends as RGB, and what is damaged, too large or of an unknown kind is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence_fast.data.pictures import open_picture
from tests.data.conftest import encode


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8040, (128, 128, 128)),
    ],
)
def test_every_mode_ends_as_rgb_over_white(mode: str, colour: object, rgb: tuple[int, int, int]) -> None:
    image = open_picture(encode(colour, mode=mode))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == rgb


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 1), 1)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0)
    opened = open_picture(out.getvalue())
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 1)) == (200, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_known_formats_open(kind: str) -> None:
    pixel = np.array(open_picture(encode((200, 100, 50), kind=kind)).getpixel((4, 4)), dtype=int)
    assert np.abs(pixel - (200, 100, 50)).max() <= 6


def test_a_format_that_runs_programs_is_not_tried() -> None:
    with pytest.raises(ValueError, match="cannot identify image file"):
        open_picture(encode((1, 2, 3), kind="EPS"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_short_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, kind)
    with pytest.raises(ValueError, match="cannot read picture: "):
        open_picture(out.getvalue()[: len(out.getvalue()) // 2])


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode((1, 2, 3), size=(20, 11))
    assert open_picture(data, max_pixels=220).size == (20, 11)
    with pytest.raises(ValueError, match="20 x 11 pixels are more than the limit of 219"):
        open_picture(data, max_pixels=219)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match="exceeds limit of 200 pixels"):
        open_picture(data, max_pixels=1000)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"cannot read .*text\.png: cannot identify"):
        open_picture(tmp_path / "text.png")
