"""Transforms: sizes, crops and values as open_clip's."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from florence_fast.data.transforms import OPENAI_MEAN, OPENAI_STD, image_transform, random_crop_box


def ramp(width: int, height: int) -> Image.Image:
    """An image whose red says the column and whose green says the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def pixels(x: torch.Tensor) -> np.ndarray:
    """Undo CLIP's normalisation: uint8 (3, H, W)."""
    mean, std = torch.tensor(OPENAI_MEAN).view(3, 1, 1), torch.tensor(OPENAI_STD).view(3, 1, 1)
    return ((x * std + mean) * 255).round().numpy().astype(np.uint8)


def test_values_are_normalised_by_channel() -> None:
    x = image_transform(4, is_train=False, mean=(0.5, 0.4, 0.0), std=0.25)(Image.new("RGB", (4, 4), (255, 102, 51)))
    assert x.shape == (3, 4, 4) and x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([2.0, 0.0, 0.8]))


@pytest.mark.parametrize(("width", "left", "top"), [(20, 5, 0), (21, 6, 0), (19, 4, 0), (10, 0, 0)])
def test_shortest_cuts_out_the_middle(width: int, left: int, top: int) -> None:
    x = pixels(image_transform(10, is_train=False)(ramp(width, 10)))
    assert (x[0, 0].min(), x[1].min()) == (left, top) and x.shape == (3, 10, 10)
    assert np.array_equal(x[0, 0], np.arange(left, left + 10))


@pytest.mark.parametrize("size", [(3, 17), (17, 3), (50, 50), (1, 1)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("is_train", [False, True])
def test_every_size_is_brought_to_the_wanted_one(size: tuple[int, int], mode: str, is_train: bool) -> None:
    for wanted in (8, (6, 9)):
        x = image_transform(wanted, is_train, resize_mode=mode)(Image.new("RGB", size, (200, 10, 60)))
        assert x.shape[1:] == ((8, 8) if wanted == 8 else wanted)
        if mode != "longest" or is_train:
            assert np.array_equal(np.unique(pixels(x).reshape(3, -1), axis=1)[:, 0], [200, 10, 60])


def test_longest_shows_everything_on_a_canvas() -> None:
    x = pixels(
        image_transform(8, is_train=False, resize_mode="longest", fill_color=9)(Image.new("RGB", (8, 4), "white"))
    )
    assert np.array_equal(x[0, :, 0], [9, 9, 255, 255, 255, 255, 9, 9])


def test_transparent_images_lie_on_white() -> None:
    x = pixels(image_transform(4, is_train=False)(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))
    assert x.min() == 255


def test_random_crops_follow_torchs_generator_and_the_given_scale() -> None:
    transform = image_transform(16, is_train=True, aug_cfg={"scale": (0.2, 0.3), "ratio": (1, 1)})
    image = ramp(100, 100)
    torch.manual_seed(1)
    first, second = transform(image), transform(image)
    torch.manual_seed(1)
    assert torch.equal(first, transform(image)) and not torch.equal(first, second)
    seen = pixels(first)[0].astype(int)
    assert 0.4 <= (seen.max() - seen.min()) / 100 <= 0.56


@pytest.mark.parametrize("size", [(100, 80), (7, 300), (300, 7), (1, 1), (2, 3)])
def test_crop_boxes_stay_inside_with_the_drawn_area(size: tuple[int, int]) -> None:
    width, height = size
    for draws in np.random.default_rng(0).random((200, 4)):
        left, top, right, bottom = random_crop_box(width, height, draws, scale=(0.5, 0.9))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        share = (right - left) * (bottom - top) / (width * height)
        assert width * height < 2000 or 0.47 <= share <= 0.93


def test_crop_boxes_reach_every_edge() -> None:
    boxes = [random_crop_box(100, 100, d, (0.25, 0.25), (1, 1)) for d in np.random.default_rng(0).random((2000, 4))]
    lefts = {box[0] for box in boxes}
    assert min(lefts) == 0 and max(lefts) == 50 and {box[2] - box[0] for box in boxes} == {50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image_size=0), "image_size must be a positive int or"),
        (dict(image_size=(2, 3, 4)), "image_size must be a positive int or"),
        (dict(image_size=8, resize_mode="shortst"), r"unknown resize_mode 'shortst' \(did you mean 'shortest'\?\)"),
        (dict(image_size=8, interpolation="nearest"), "unknown interpolation 'nearest'"),
        (dict(image_size=8, aug_cfg={"scales": (1, 1)}), r"unknown key of aug_cfg 'scales' \(did you mean 'scale'\?\)"),
        (dict(image_size=8, mean=(0.5, 0.5)), "mean must be one number or three, got 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_transform(is_train=True, **arguments)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_transforms_after_its_parent_has_used_threads() -> None:
    def check() -> None:
        image_transform(224, is_train=False)(Image.new("RGB", (600, 500)))
        assert torch.get_num_threads() == 2

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).exp().sum()
        child = multiprocessing.get_context("fork").Process(target=check)
        child.start()
        child.join(30)
    finally:
        torch.set_num_threads(before)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def test_a_path_is_opened(tmp_path: Path) -> None:
    ramp(20, 10).save(tmp_path / "a.png")
    transform = image_transform(8, is_train=False)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(transform(path), transform(ramp(20, 10)))


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"a uint8 ndarray of shape \(8, 8, 3\)"),
        (torch.zeros(3, 8, 8), r"a torch.float32 Tensor of shape \(3, 8, 8\)"),
        (None, "a NoneType"),
    ],
)
def test_arrays_and_tensors_are_refused_with_the_way_out(given: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"image must be a PIL image or the path of an image file, got {got}.*fromarr"):
        image_transform(8, is_train=False)(given)
