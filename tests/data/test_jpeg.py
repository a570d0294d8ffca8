"""JPEG files through simplejpeg: equal to Pillow to the bit, in errors too."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from florence_fast.data import jpeg
from florence_fast.data.images import open_image, oriented
from florence_fast.info import devices

needs_simplejpeg = pytest.mark.skipif(jpeg.decoder_name() != "simplejpeg", reason="simplejpeg is not installed")


def saved(mode: str = "RGB", size: tuple[int, int] = (131, 97), **options: object) -> bytes:
    """A JPEG file of smooth waves under noise."""
    x, y = np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1])[:, None]
    waves = np.stack([127 + 80 * np.sin(x * k) * np.cos(y * (k + 1)) for k in (1, 2, 3)], axis=2)
    noisy = (waves + np.random.default_rng(0).normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def opened(data: bytes) -> tuple[object, ...] | str:
    """What `open_image` makes of a file: all that a caller sees of the image, or the words of its refusal."""
    try:
        image = open_image(data)
    except ValueError as error:
        return str(error)
    return image.mode, image.size, image.tobytes(), image.info, dict(image.getexif())


def by_both(data: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[object, ...] | str, tuple[object, ...] | str]:
    """What simplejpeg and Pillow make of a file."""
    ours = opened(data)
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "_simplejpeg", lambda: None)
        return ours, opened(data)


FILES = {
    "grey": {"mode": "L"},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive-grey": {"mode": "L", "progressive": True},
    "best": {"quality": 100},
    "worst": {"quality": 5},
    "restarts": {"restart_marker_blocks": 3},
    "stored-as-rgb": {"keep_rgb": True},
    "cmyk": {"mode": "CMYK"},
    **{
        f"{width}x{height}": {"size": (width, height)} for width, height in [(1, 1), (7, 5), (16, 16), (1, 40), (33, 2)]
    },
}


@needs_simplejpeg
@pytest.mark.parametrize("options", FILES.values(), ids=FILES.keys())
def test_pixels_are_those_of_pillow(options, monkeypatch):
    data = saved(**options)
    ours, pillow = by_both(data, monkeypatch)
    assert ours == pillow and ours[0] == "RGB"
    taken = jpeg.decode(data, Image.open(io.BytesIO(data)))
    assert (taken is None) == (options.get("mode") == "CMYK")


@needs_simplejpeg
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_data_turn_the_image_as_pillow_does(orientation, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(exif=exif)
    ours, pillow = by_both(data, monkeypatch)
    assert ours == pillow and ours[1] == (131, 97)
    assert np.array_equal(oriented(open_image(data)), oriented(Image.open(io.BytesIO(data))))


@needs_simplejpeg
def test_damaged_files_have_pillows_pixels_and_errors(monkeypatch):
    data, random = saved(), np.random.default_rng(0)
    files = [data[:cut] for cut in (3, 100, len(data) // 2, len(data) - 40, len(data) - 1)]
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(2, len(data), 3):
            damaged[place] = random.integers(256)
        files.append(bytes(damaged))
    found = [by_both(file, monkeypatch) for file in [*files, data + b"more", data + data]]
    assert [ours == pillow for ours, pillow in found] == [True] * len(found)
    assert "truncated" in found[2][0]


@needs_simplejpeg
def test_the_limit_of_pixels_comes_first(monkeypatch):
    monkeypatch.setattr(jpeg, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="131 x 97 pixels are more than the limit of 100"):
        open_image(saved(), max_pixels=100)


@pytest.mark.parametrize("name", ["Pillow", "simplejpeg"])
def test_info_names_the_decoder(name, monkeypatch):
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None if name == "Pillow" else jpeg)
    assert {"device": "cpu, JPEG files", "what": f"decoded by {name}"} in devices()


def test_other_formats_and_a_missing_package_are_left_to_pillow(monkeypatch):
    out = io.BytesIO()
    Image.new("RGB", (3, 3)).save(out, "PNG")
    assert jpeg.decode(out.getvalue(), Image.open(io.BytesIO(out.getvalue()))) is None
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    assert jpeg.decode(saved(), Image.open(io.BytesIO(saved()))) is None
    assert open_image(saved()).size == (131, 97)
