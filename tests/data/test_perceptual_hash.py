"""Perceptual hashes: native and NumPy bit for bit, both against exact fractions; copies are near, others far."""

import io
import math
import multiprocessing
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from florence_fast import native
from florence_fast.data.artists import artists_test
from florence_fast.data.labels import text_labels
from florence_fast.data.near_duplicates import near_duplicate_groups, near_duplicates
from florence_fast.data.perceptual_hash import COSINES, area_means_reference, dhash, phash

HASHES = {"dhash": dhash, "phash": phash}
BACKENDS = [pytest.param("native", marks=pytest.mark.native), "numpy"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the same bits."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "extension", lambda: None)
    elif native.extension() is None:
        pytest.skip("the native extension was not built")
    return request.param


def random_image(seed: int, height: int, width: int, grey: bool) -> np.ndarray:
    shape = (height, width) if grey else (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def exact_means(image: np.ndarray, rows: int, columns: int) -> list[list[int]]:
    """The definition once more, a pixel at a time, in fractions."""
    height, width = image.shape[:2]

    def share(cell: int, cells: int, pixel: int, pixels: int) -> Fraction:
        begin, end = Fraction(cell * pixels, cells), Fraction((cell + 1) * pixels, cells)
        return max(min(end, Fraction(pixel + 1)) - max(begin, Fraction(pixel)), Fraction(0))

    def light(y: int, x: int) -> Fraction:
        if image.ndim == 2:
            return Fraction(int(image[y, x]))
        red, green, blue = (int(value) for value in image[y, x])
        return Fraction(299 * red + 587 * green + 114 * blue, 1000)

    def mean(row: int, column: int) -> int:
        total = sum(
            share(row, rows, y, height) * share(column, columns, x, width) * light(y, x)
            for y in range(height)
            for x in range(width)
        )
        return math.floor(total * rows * columns / (height * width) + Fraction(1, 2))

    return [[mean(row, column) for column in range(columns)] for row in range(rows)]


@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 14), st.booleans())
def test_means_are_those_of_exact_fractions(seed, height, width, grey):
    image = random_image(seed, height, width, grey)
    assert area_means_reference(image, 4, 5).tolist() == exact_means(image, 4, 5)


@pytest.mark.native
@pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")
@given(
    st.integers(0, 999), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.sampled_from([(8, 9), (32, 32)])
)
def test_native_means_are_those_of_numpy(seed, height, width, grey, grid):
    image = random_image(seed, height, width, grey)
    cells = native.extension().area_means(1, [image], *grid)[0]
    assert np.array_equal(cells, area_means_reference(image, *grid))


@pytest.mark.parametrize("shape", [(3000, 5, 3), (9000, 3), (5, 3000, 3)], ids=["sums-of-16-bits-end", "grey", "wide"])
def test_tall_and_wide_white_images_do_not_overflow(backend, shape):
    white = np.full(shape, 255, np.uint8)
    assert dhash(white) == 0
    assert phash(white) == 2**63, "only the mean is above the median"


@pytest.mark.parametrize(
    "image, wanted", [("growing", 2**64 - 1), ("falling", 0), ("left-half-dark", 0x1010101010101010)]
)
def test_dhash_says_where_the_right_neighbour_is_brighter(backend, image, wanted):
    row = {"growing": range(0, 90, 10), "falling": range(90, 0, -10), "left-half-dark": [9] * 4 + [99] * 5}[image]
    pixels = np.tile(np.array(row, np.uint8), (8, 1))
    assert dhash(pixels) == wanted
    assert dhash(np.repeat(np.repeat(pixels, 7, axis=0), 11, axis=1)) == wanted


def test_phash_is_the_cosine_transform_against_its_median(backend):
    image = random_image(3, 32, 32, grey=True)
    cosine = np.cos(np.pi / 64 * np.outer(np.arange(32), 2 * np.arange(32) + 1))
    low = (cosine @ image.astype(float) @ cosine.T)[:8, :8].reshape(-1)
    wanted = "".join("1" if value > np.median(low) else "0" for value in low)
    assert f"{int(phash(image)):064b}" == wanted


def test_the_cosines_are_the_same_whatever_the_mathematical_library():
    exact = COSINES.astype(np.int64)
    assert np.array_equal(exact, COSINES)
    unrounded = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)) * 2**14
    assert np.abs(np.abs(unrounded - exact) - 0.5).min() > 0.01, "no value is near the border between two integers"
    assert exact[1:].sum(axis=1).tolist() == [0] * 7, "an image of one colour has no frequency but 0"


def test_recorded_values(backend):
    image = (np.arange(40 * 50 * 3, dtype=np.int64).reshape(40, 50, 3) ** 2 % 251).astype(np.uint8)
    assert (f"{dhash(image):016x}", f"{phash(image):016x}") == ("95d39292d2524869", "c108ac5fa8cbec4f")


@pytest.mark.parametrize("name", HASHES)
def test_one_many_arrays_and_images_agree(backend, name):
    hash_ = HASHES[name]
    batch = np.stack([random_image(seed, 20, 30, grey=False) for seed in range(70)])
    hashes = hash_(batch)
    assert hashes.shape == (70,) and hashes.dtype == np.uint64
    assert isinstance(hash_(batch[0]), np.uint64)
    assert [hash_(image) for image in batch[:3]] == hashes[:3].tolist()
    assert np.array_equal(hash_(Image.fromarray(image) for image in batch), hashes)
    assert np.array_equal(hash_(batch, threads=2), hash_(batch, threads=1))
    assert np.array_equal(hash_(np.asfortranarray(batch)[:, ::1]), hashes)
    grey = random_image(0, 9, 40, grey=True)
    assert hash_([grey, batch[1], Image.fromarray(grey)]).tolist() == [hash_(grey), hashes[1], hash_(grey)]
    assert hash_(np.stack([grey] * 3, axis=2)) == hash_(grey)
    assert hash_([]).shape == (0,)


def test_transparent_parts_are_white(backend):
    drawing = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    drawing.paste((200, 0, 0, 255), (0, 0, 10, 20))
    on_white = Image.new("RGB", (20, 20), "white")
    on_white.paste((200, 0, 0), (0, 0, 10, 20))
    assert dhash(drawing) == dhash(on_white) and phash(drawing) == phash(on_white)


@pytest.mark.parametrize("name, near", [("dhash", 4), ("phash", 6)])
def test_copies_of_real_drawings_are_found_and_other_drawings_are_not(backend, name, near):
    source = artists_test()
    originals = [source.image(index) for index in range(0, len(source), 20)]
    copies = [recoded(image.resize((96, 96), Image.Resampling.BICUBIC)) for image in originals]
    count = len(originals)
    hashes = HASHES[name](originals + copies)
    own = np.bitwise_xor(hashes[:count], hashes[count:])
    distance = np.array([int(value).bit_count() for value in own])
    assert np.median(distance) <= 2 and (distance <= near).mean() > 0.9, distance
    pairs = near_duplicates(hashes, near)
    copied = pairs[:, 1] - pairs[:, 0] == count
    assert copied.sum() == (distance <= near).sum()
    assert copied.mean() > 0.9, f"near, and no copies: {pairs[~copied].tolist()}"
    labels = near_duplicate_groups(hashes, near)
    assert (labels[:count] == labels[count:]).mean() > 0.9


def recoded(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return Image.open(out).convert("RGB")


@pytest.mark.parametrize(
    "images, error, message",
    [
        (7, TypeError, "images must be arrays or PIL images, got int"),
        (["cat.png"], TypeError, "an image must be an array or a PIL image, got str"),
        (np.zeros((4, 4)), ValueError, r"an image must be uint8 \(H, W\) or \(H, W, 3\), got float64 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got uint8 \(4, 4, 4\)"),
        (np.zeros(4, np.uint8), ValueError, r"got uint8 \(4,\)"),
        (np.zeros((0, 4), np.uint8), ValueError, "an image must have pixels"),
        (np.broadcast_to(np.uint8(1), (2**24 + 1, 1)), ValueError, "an image must be at most"),
    ],
)
def test_bad_images_are_refused(backend, images, error, message):
    with pytest.raises(error, match=message):
        dhash(images)


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, "2"])
def test_bad_numbers_of_threads_are_refused(threads):
    with pytest.raises(ValueError, match="threads must be an int from 1 to 4096"):
        phash([], threads=threads)


def broken(image: Image.Image) -> Image.Image:
    """The same as a JPEG that was cut short, not decoded yet."""
    out = io.BytesIO()
    image.save(out, "JPEG")
    return Image.open(io.BytesIO(out.getvalue()[:900]))


def test_one_bad_image_of_many_is_named_or_left_out(backend, caplog):
    images = [Image.fromarray(random_image(seed, 64, 64, grey=False)) for seed in range(70)]
    wanted = phash(images)
    images[3], images[66] = broken(images[3]), Image.new("RGB", (0, 5))
    with pytest.raises(ValueError, match="image 3 cannot be hashed: image file is truncated"):
        phash(iter(images))
    found = phash(iter(images), skip_bad=True)
    good = [number for number in range(70) if number not in (3, 66)]
    assert found.indices.tolist() == good and np.array_equal(found.hashes, wanted[good])
    assert "skipped image 3: " in caplog.text and "skipped image 66: " in caplog.text
    with pytest.raises(ValueError, match="the image cannot be hashed: "):
        dhash(broken(images[0]))
    alone = dhash(broken(images[0]), skip_bad=True)
    assert alone.hashes.shape == alone.indices.shape == (0,) and alone.hashes.dtype == np.uint64
    with pytest.raises(TypeError, match="image 1: an image must be an array or a PIL image, got int"):
        dhash([images[0], 7], skip_bad=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_copy_that_is_turned_by_its_exif_data_has_the_same_hash(backend, orientation):
    upright = Image.fromarray(random_image(5, 30, 40, grey=False))
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    turned = upright
    for step in stored:
        turned = turned.transpose(step)
    turned.save(out, "PNG", exif=exif)
    copy = Image.open(out)
    assert dhash(copy) == dhash(upright) and phash([copy])[0] == phash(upright)


@pytest.mark.native
@pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("threads", [None, 2])
def test_a_forked_process_hashes_after_its_parent_has_used_threads(threads):
    batch = np.stack([random_image(seed, 300, 300, grey=False) for seed in range(16)])
    texts = [f"text {number}" for number in range(5000)]
    many = np.random.default_rng(0).integers(0, 2**63, 100_000, dtype=np.uint64)

    def hash_all():
        phash(batch, threads=threads), text_labels(texts, threads=threads), near_duplicates(many, threads=threads)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        hash_all()
        child = multiprocessing.get_context("fork").Process(target=hash_all)
        child.start()
        child.join(30)
    finally:
        torch.set_num_threads(before)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0
