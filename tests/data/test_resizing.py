"""Resizing: torch's values are Pillow's, up to rounding, and extreme proportions take little memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from florence_fast.data import resizing
from florence_fast.data.resizing import INTERPOLATIONS, fit, resize
from florence_fast.data.transforms import image_transform


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """Without edges: overshoot, cut off between the two passes, depends on which of them comes first."""
    return noise(5, 5).resize((width, height), Image.Resampling.BICUBIC)


def difference(one: np.ndarray, other: Image.Image) -> np.ndarray:
    return np.abs(one.astype(int) - np.asarray(other))


SIZES = [(640, 480), (333, 500), (97, 101), (40, 1000), (50, 64), (224, 300), (3, 17), (1, 1)]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [(64, 64), (48, 80)])
def test_values_are_pillows_up_to_rounding(size: tuple[int, int], wanted: tuple[int, int], interpolation: str) -> None:
    resample = INTERPOLATIONS[interpolation]
    image = smooth(*size)
    whole = image.resize(wanted[::-1], resample)
    assert difference(resize(image, wanted, interpolation), whole).max() <= 2
    noisy = noise(*size)
    assert difference(resize(noisy, wanted, interpolation), noisy.resize(wanted[::-1], resample)).mean() < 1
    box = (size[0] // 4, size[1] // 5, size[0] - size[0] // 7, size[1] - size[1] // 6)
    part = image.crop(box).resize(wanted[::-1], resample)
    assert difference(resize(image, wanted, interpolation, box), part).max() <= 2


def test_an_image_of_the_wanted_size_is_left_alone() -> None:
    image = noise(30, 20)
    assert np.array_equal(resize(image, (20, 30), "bicubic"), image)
    assert np.array_equal(resize(image, (5, 7), "bicubic", (3, 4, 10, 9)), np.asarray(image)[4:9, 3:10])


def middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The definition: resize so that the image just covers the result, then cut the middle out."""
    height, width = size
    if image.width * height <= image.height * width:
        scaled = width, int(width * image.height / image.width)
    else:
        scaled = int(height * image.width / image.height), height
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


@pytest.mark.parametrize("limit", [resizing.MAX_BETWEEN, 1000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [(64, 64), (48, 80)])
def test_shortest_is_the_middle_of_the_whole_even_if_only_that_is_resized(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], wanted: tuple[int, int], limit: int
) -> None:
    monkeypatch.setattr(resizing, "MAX_BETWEEN", limit)
    image = smooth(*size)
    assert difference(fit(image, wanted, "shortest", "bicubic"), middle(image, wanted)).max() <= 2


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
def test_longest_shows_all_of_it_on_a_canvas(shape: tuple[int, int]) -> None:
    image = smooth(*shape)
    shown = fit(image, (60, 60), "longest", "bilinear", fill=9)
    inside = (slice(20, 40), slice(0, 60)) if shape[0] > shape[1] else (slice(0, 60), slice(20, 40))
    assert np.array_equal(shown[inside], resize(image, (20, 60) if shape[0] > shape[1] else (60, 20), "bilinear"))
    shown[inside] = 9
    assert (shown == 9).all()


def test_resizing_downwards_first_changes_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(30, 900)
    usual = resize(image, (50, 40), "bicubic")
    monkeypatch.setattr(resizing, "MAX_BETWEEN", 1000)
    assert difference(resize(image, (50, 40), "bicubic"), Image.fromarray(usual)).max() <= 2


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1), (3, 300_000)])
@pytest.mark.parametrize("is_train", [False, True])
def test_thin_images_take_little_memory(
    monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int], is_train: bool
) -> None:
    limit, between = 2**20, [0]
    monkeypatch.setattr(resizing, "MAX_BETWEEN", limit)
    by_pillow, by_torch = Image.Image.resize, F.interpolate

    def watched_pillow(image: Image.Image, to: tuple[int, int], resample: int, box: tuple[float, ...]) -> Image.Image:
        between.append(to[0] * (box[3] - box[1]))
        return by_pillow(image, to, resample, box=box)

    def watched_torch(x: torch.Tensor, to: tuple[int, int], **options: object) -> torch.Tensor:
        between.append(x.shape[2] * to[1])
        return by_torch(x, to, **options)

    monkeypatch.setattr(Image.Image, "resize", watched_pillow)
    monkeypatch.setattr(F, "interpolate", watched_torch)
    x = image_transform(64, is_train, mean=0.0, std=1.0, resize_mode=mode)(Image.new("RGB", size, (200, 10, 60)))
    assert x.shape == (3, 64, 64) and max(between) <= limit
    if mode != "longest" or is_train:
        assert (x[:, 5, 5] * 255).round().tolist() == [200, 10, 60] and x.flatten(1).std(1).max() < 1e-6
