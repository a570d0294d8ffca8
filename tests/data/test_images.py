"""Opening images: every mode ends as RGB, and what is damaged, too large or of an unknown kind is refused."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence_fast.data.images import MAX_FILE_BYTES, open_image, oriented, to_rgb
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
    image = open_image(encode(colour, mode=mode))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == rgb


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def saved(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(saved(RAMP.astype(np.uint16), "PNG"), id="png-16"),
        pytest.param(saved(RAMP.astype(np.uint16), "TIFF"), id="tiff-16"),
        pytest.param(saved(RAMP.astype(np.int32), "TIFF"), id="tiff-int32"),
        pytest.param(saved(RAMP.astype(np.float32), "TIFF"), id="tiff-float"),
        pytest.param(b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(), id="pgm-16"),
    ],
)
def test_sixteen_bits_in_any_container_keep_their_upper_eight(data: bytes) -> None:
    grey = np.asarray(open_image(data))
    assert np.array_equal(grey, np.repeat((RAMP.astype(np.uint16) >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100.4, 255]], np.float32), [0, 100, 255]),
        (np.array([[-1000, 0, 3000]], np.float32), [0, 64, 255]),
        (np.array([[0.0, np.nan, np.inf, 1]], np.float32), [0, 0, 0, 255]),
        (np.array([[np.nan, -np.inf]], np.float32), [0, 0]),
        (np.array([[np.finfo(np.float32).min, -10, 10]], np.float32), [0, 0, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[-1000, 0, 3000]], np.int32), [0, 64, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[-5, -5]], np.int32), [0, 0]),
    ],
)
def test_32_bit_values_are_scaled_by_their_range(values: np.ndarray, grey: list[int]) -> None:
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 1].tolist() == grey


def test_a_float_map_is_no_16_bit_pgm() -> None:
    assert open_image(b"Pf 2 1 -1.0\n" + np.array([0, 1], "<f4").tobytes()).getpixel((1, 0)) == (255, 255, 255)


def test_a_dark_16_bit_pgm_stays_dark() -> None:
    pgm = b"P5 4 4 65535\n" + np.full((4, 4), 200, ">u2").tobytes()
    assert open_image(pgm).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_opening_keeps_what_says_how_to_turn(kind: str, mode: str) -> None:
    image, exif, out = Image.new(mode, (20, 10)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.convert("RGB" if kind == "JPEG" and mode == "RGBA" else mode).save(out, kind, exif=exif)
    opened = open_image(out.getvalue())
    assert opened.size == (20, 10) and oriented(opened).size == (10, 20)
    assert oriented(Image.new("RGB", (20, 10))).size == (20, 10)


def test_damaged_exif_data_turns_nothing() -> None:
    image = Image.new("RGB", (20, 10))
    image.info["exif"] = b"Exif\0\0II*\0\xff\xff"
    assert oriented(image).size == (20, 10)


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 1), 1)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0)
    opened = open_image(out.getvalue())
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 1)) == (200, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_known_formats_open(kind: str) -> None:
    pixel = np.array(open_image(encode((200, 100, 50), kind=kind)).getpixel((4, 4)), dtype=int)
    assert np.abs(pixel - (200, 100, 50)).max() <= 6


def test_a_format_that_runs_programs_is_not_tried() -> None:
    with pytest.raises(ValueError, match="cannot identify image file"):
        open_image(encode((1, 2, 3), kind="EPS"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_short_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, kind)
    with pytest.raises(ValueError, match="cannot read image: "):
        open_image(out.getvalue()[: len(out.getvalue()) // 2])


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode((1, 2, 3), size=(20, 11))
    assert open_image(data, max_pixels=220).size == (20, 11)
    with pytest.raises(ValueError, match="20 x 11 pixels are more than the limit of 219"):
        open_image(data, max_pixels=219)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match="exceeds limit of 200 pixels"):
        open_image(data, max_pixels=1000)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read .*text\.png: cannot identify image file$"):
        open_image(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"cannot read .*empty\.png: it is empty, 0 bytes$"):
        open_image(tmp_path / "empty.png")


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=f"cannot read {path}: an image file was wanted, got a pipe, socket or"):
            open_image(path)
    with pytest.raises(ValueError, match="an image file was wanted, got a folder"):
        open_image(tmp_path)


def test_a_file_of_many_zeros_is_refused_by_its_size(tmp_path: Path) -> None:
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=r"sparse.png: its 1,073,741,825 bytes are more than the limit"):
        open_image(tmp_path / "sparse.png")
