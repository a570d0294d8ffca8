"""Sources that are joined by factors: how often each sample comes in an epoch."""

import math
from collections import Counter

import pytest

from florence_fast.data.mixture import mix


@pytest.mark.parametrize(
    ("factors", "repeats"),
    [([1, 1], [1, 1]), ([2, 4], [1, 2]), ([1, 2.5], [2, 5]), ([0.3, 0.1], [3, 1]), ([1.5, 1], [3, 2])],
)
def test_every_sample_comes_as_often_as_its_factor_says(list_pairs, factors, repeats) -> None:
    sources = [list_pairs(3), list_pairs(5)]
    mixed = mix(sources, factors)
    assert len(mixed) == 3 * repeats[0] + 5 * repeats[1]
    places = [mixed._locate(i) for i in range(len(mixed))]
    found = Counter((id(source), index) for source, index in places)
    assert sorted(found.values()) == sorted([repeats[0]] * 3 + [repeats[1]] * 5)


def test_one_source_stays_as_it_is(list_pairs) -> None:
    source = list_pairs(3)
    assert mix([source], [7.5]) is source


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1], "factors must be one for each of 2 sources, got 1"),
        ([1, 0], "a factor must be a positive number, got 0"),
        ([1, math.nan], "a factor must be a positive number, got nan"),
        ([1, math.inf], "a factor must be a positive number, got inf"),
        ([1, 5000], "must not differ by more than 1000 times"),
    ],
)
def test_wrong_factors_are_named(list_pairs, factors, message) -> None:
    with pytest.raises(ValueError, match=message):
        mix([list_pairs(3), list_pairs(3)], factors)
