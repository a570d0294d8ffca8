"""Draws and orders: functions of (seed, epoch, index), even, and grouped by text where that is asked for."""

import numpy as np
import pytest

from florence_fast.data.sampling import CROP, TEXT, epoch_order, random_bits, uniform


def test_bits_are_the_same_on_every_machine() -> None:
    assert random_bits(0, 0, 0, np.array([0, 1])).tolist() == [2391539541053276776, 3048674281419798293]


def test_draws_follow_seed_stream_epoch_and_index_only() -> None:
    index = np.arange(50)
    draws = uniform(3, TEXT, 1, index, 4)
    assert draws.shape == (50, 4) and draws.min() >= 0 and draws.max() < 1
    chosen = np.array([7, 7, 31])
    assert np.array_equal(uniform(3, TEXT, 1, chosen, 4), draws[chosen])
    assert np.array_equal(uniform(3, TEXT, np.array([0, 1, 1]), chosen, 4)[1:], draws[chosen[1:]])
    for other in (uniform(4, TEXT, 1, index, 4), uniform(3, CROP, 1, index, 4), uniform(3, TEXT, 2, index, 4)):
        assert not np.isclose(other, draws).any()


def test_draws_are_even_and_their_columns_unrelated() -> None:
    draws = uniform(0, TEXT, 0, np.arange(20_000), 4)
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in draws.T])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03


def test_an_epoch_holds_each_pair_once_and_another_order_than_its_neighbour() -> None:
    first, again, next_one = (epoch_order(5, epoch, 1000) for epoch in (0, 0, 1))
    assert np.array_equal(np.sort(first), np.arange(1000)) and np.array_equal(first, again)
    assert (first == next_one).sum() < 10 and (first == epoch_order(6, 0, 1000)).sum() < 10
    assert np.abs(np.diff(first)).mean() > 250


@pytest.mark.parametrize("per_text", [2, 3])
def test_images_of_a_text_come_in_groups_that_change(per_text: int) -> None:
    text_ids = np.random.default_rng(0).integers(0, 60, 300)
    text_ids = np.unique(text_ids, return_inverse=True)[1]
    orders = [epoch_order(0, epoch, 300, text_ids, per_text) for epoch in range(2)]
    groups = [split_into_groups(order, text_ids, per_text) for order in orders]
    for order, found in zip(orders, groups, strict=True):
        assert np.array_equal(np.sort(order), np.arange(300))
        sizes = {text: sorted(len(g) for g in found if text_ids[g[0]] == text) for text in set(text_ids)}
        for text, count in enumerate(np.bincount(text_ids)):
            rest = [count % per_text] if count % per_text else []
            assert sizes[text] == rest + [per_text] * (count // per_text)
    together = [{frozenset(g) for g in found if len(g) == per_text} for found in groups]
    assert len(together[0] & together[1]) < len(together[0]) // 2
    texts_in_order = [text_ids[g[0]] for g in groups[0]]
    assert texts_in_order != sorted(texts_in_order)


def split_into_groups(order: np.ndarray, text_ids: np.ndarray, per_text: int) -> list[list[int]]:
    """Cut an order where the text changes; two groups of one text that happen to meet are cut by their size."""
    groups: list[list[int]] = []
    for index in order.tolist():
        new = not groups or text_ids[groups[-1][0]] != text_ids[index] or len(groups[-1]) == per_text
        groups.append([index]) if new else groups[-1].append(index)
    return groups
