"""The second test of the demo: the drawings stay, and everything around them is another ground."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from florence_fast.data.artists import artists_test
from florence_fast.demo.grounds import FRAME_WIDTH, GROUNDS, NAMES, OnGround, forty_images


def disc() -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill=(20, 120, 40))
    return image


@pytest.mark.parametrize("ground", sorted(set(GROUNDS) - {"frame"}))
def test_a_ground_replaces_white_and_leaves_the_drawing(ground):
    on_ground = np.asarray(GROUNDS[ground](disc())).astype(int)
    inside = on_ground[20:44, 20:44]
    assert np.abs(inside - (20, 120, 40)).max() <= 1
    outside = np.concatenate([on_ground[:10].reshape(-1, 3), on_ground[-10:].reshape(-1, 3)])
    assert (outside.min(1) < 215).mean() > 0.9


def test_a_frame_keeps_the_white_ground_and_the_whole_drawing():
    framed = np.asarray(GROUNDS["frame"](disc())).astype(int)
    assert framed.shape == (64, 64, 3)
    assert (framed[:FRAME_WIDTH] == framed[0, 0]).all() and (framed[:, -FRAME_WIDTH:] == framed[0, 0]).all()
    assert framed[FRAME_WIDTH + 2, FRAME_WIDTH + 2].min() > 250 and framed[32, 32, 1] > framed[32, 32, 0]


def test_all_grounds_differ():
    images = [np.asarray(draw(disc())).tobytes() for draw in GROUNDS.values()]
    assert len(set(images)) == len(GROUNDS) == 6


def test_forty_images_have_forty_names_of_the_whole_set():
    chosen = forty_images()
    names = [chosen.texts(index).text for index in range(len(chosen))]
    assert len(set(names)) == len(chosen) == NAMES == 40
    assert names[0] == artists_test().texts(0).text


def test_pairs_on_a_ground_keep_texts_and_say_the_ground():
    source = OnGround(artists_test(), "stripes")
    assert len(source) == len(artists_test()) and source.texts(3) == artists_test().texts(3)
    assert source.describe(3).endswith("(stripes)")
    assert source.image(3).size == artists_test().image(3).size
