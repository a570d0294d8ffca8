"""The cache of decoded images: what is in it, and its smaller copies."""

import numpy as np
import torch

from florence_fast.data.picture_cache import PictureCache


def test_an_image_is_there_once_it_was_put_and_comes_back_unchanged() -> None:
    cache = PictureCache(3, size=4)
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    cache.put(1, image)
    assert [index in cache for index in range(3)] == [False, True, False]
    taken = cache.take(np.array([1, 1]), size=4)
    assert torch.equal(taken, torch.from_numpy(np.stack([image, image])))
    taken.zero_()
    assert torch.equal(cache.take(np.array([1]), size=4)[0], torch.from_numpy(image))


def test_a_smaller_copy_is_made_when_it_is_asked_for() -> None:
    cache = PictureCache(2, size=4)
    cache.put(0, np.full((3, 4, 4), 10, dtype=np.uint8))
    assert cache.take(np.array([0]), size=2).unique().tolist() == [10]
    cache.put(1, np.full((3, 4, 4), 20, dtype=np.uint8))
    assert cache.take(np.array([1, 0, 1]), size=2).flatten(1).float().mean(1).tolist() == [20, 10, 20]
