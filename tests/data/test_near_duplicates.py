"""Near-duplicates: native and NumPy against all compared with all; limits, threads, large buckets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence_fast import native
from florence_fast.data.near_duplicates import (
    NearDuplicateIndex,
    near_duplicate_groups,
    near_duplicates,
    near_duplicates_reference,
)

BACKENDS = [pytest.param("native", marks=pytest.mark.native), "numpy"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the same pairs."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "extension", lambda: None)
    elif native.extension() is None:
        pytest.skip("the native extension was not built")
    return request.param


def planted(seed: int, count: int, kinds: int, flips: int) -> np.ndarray:
    """Hashes of ``kinds`` kinds, each copy with up to ``flips`` of its bits turned."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, kinds, dtype=np.uint64)[generator.integers(0, kinds, count)]
    for _ in range(flips):
        turned = np.uint64(1) << generator.integers(0, 64, count, dtype=np.uint64)
        hashes ^= np.where(generator.random(count) < 0.6, turned, np.uint64(0))
    return hashes


def groups_reference(hashes: np.ndarray, max_distance: int) -> list[int]:
    labels = list(range(len(hashes)))
    for a, b, _ in near_duplicates_reference(hashes, max_distance):
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    return labels


@given(
    st.integers(0, 9999),
    st.integers(0, 120),
    st.integers(1, 60),
    st.integers(0, 5),
    st.integers(0, 20) | st.integers(21, 64),
)
def test_pairs_and_groups_are_those_of_the_definition(seed, count, kinds, flips, max_distance):
    hashes = planted(seed, count, kinds, flips)
    wanted = [list(pair) for pair in near_duplicates_reference(hashes, max_distance)]
    labels = groups_reference(hashes, max_distance)
    for extension in {native.extension(), None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "extension", lambda extension=extension: extension)
            assert near_duplicates(hashes, max_distance).tolist() == wanted
            assert near_duplicate_groups(hashes, max_distance).tolist() == labels


@pytest.mark.native
@pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")
@pytest.mark.parametrize("max_distance", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("kind", ["random", "much-in-common", "few-bits"])
def test_buckets_within_buckets_find_what_numpy_finds(monkeypatch, kind, max_distance):
    hashes = planted(1, 3000, 2000, 3)
    if kind == "much-in-common":  # as of images with a white border: 32 bits are equal in all of them
        hashes &= np.uint64(0x0000_FFFF_F0F0_0F0F)
    if kind == "few-bits":
        hashes &= np.uint64(0x0003_0300_0100_0307)
        hashes = hashes[:900]
    results = []
    for threads in (1, 2, 5):
        results.append(near_duplicates(hashes, max_distance, threads=threads))
        results.append(near_duplicate_groups(hashes, max_distance, threads=threads))
    monkeypatch.setattr(native, "extension", lambda: None)
    wanted = [near_duplicates(hashes, max_distance), near_duplicate_groups(hashes, max_distance)]
    assert len(wanted[0]) > 10
    for number, result in enumerate(results):
        assert np.array_equal(result, wanted[number % 2]), f"threads {(1, 2, 5)[number // 2]}"


@pytest.mark.native
@pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")
def test_every_planted_neighbour_among_many_is_found_by_any_number_of_threads():
    hashes = planted(2, 300_000, 300_000, 0)
    copies = hashes[:3000].copy()
    generator = np.random.default_rng(3)
    for _ in range(3):
        copies ^= np.uint64(1) << generator.integers(0, 64, 3000, dtype=np.uint64)
    both = np.concatenate([hashes, copies])
    pairs = near_duplicates(both, 3, threads=1)
    assert np.array_equal(near_duplicates(both, 3, threads=2), pairs)
    assert set(range(300_000, 303_000)) <= set(pairs[:, 1].tolist())
    labels = near_duplicate_groups(both, 3, threads=2)
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    assert np.array_equal(near_duplicate_groups(both, 3, threads=1), labels)


def test_very_many_equal_hashes_are_one_group(backend):
    hashes = np.full(20_000, 2**63 + 5, dtype=np.uint64)
    hashes[7777] ^= np.uint64(1)
    assert not near_duplicate_groups(hashes, 1).any()
    assert np.unique(near_duplicate_groups(hashes, 0)).tolist() == [0, 7777]
    with pytest.raises(ValueError, match="more than max_pairs=10,000,000 pairs within max_distance=0"):
        near_duplicates(hashes, 0)


def test_the_limit_of_pairs_is_exact(backend):
    hashes = planted(4, 400, 40, 2)
    count = len(near_duplicates(hashes, 4))
    assert len(near_duplicates(hashes, 4, max_pairs=count)) == count
    with pytest.raises(
        ValueError, match=f"more than max_pairs={count - 1:,} pairs within max_distance=4: take near_dup"
    ):
        near_duplicates(hashes, 4, max_pairs=count - 1)
    assert near_duplicates(hashes[:1], 4, max_pairs=0).shape == (0, 3)


def test_few_and_strided_hashes(backend):
    for count in range(3):
        hashes = np.zeros(count, np.uint64)
        assert near_duplicates(hashes).tolist() == [[0, 1, 0]] * (count == 2)
        assert near_duplicate_groups(hashes).tolist() == [0] * count
    strided = planted(5, 200, 20, 1)[::2]
    assert near_duplicates(strided, 2).tolist() == near_duplicates(strided.copy(), 2).tolist()
    assert near_duplicates(strided, 2).dtype == np.int64


def test_an_index_grows_and_answers_as_the_definition(backend):
    index, hashes = NearDuplicateIndex(), planted(6, 3000, 300, 2)
    assert index.query(hashes[:2]).shape == (0, 3)
    numbers = [index.add(part) for part in (hashes[:5], hashes[5:5], hashes[5:1700], hashes[1700:])]
    assert np.concatenate(numbers).tolist() == list(range(3000))
    assert len(index) == 3000 and np.array_equal(index.hashes, hashes)
    queries = planted(6, 20, 300, 3)
    wanted = [
        [q, i, (int(query) ^ int(value)).bit_count()]
        for q, query in enumerate(queries)
        for i, value in enumerate(hashes)
        if (int(query) ^ int(value)).bit_count() <= 5
    ]
    assert len(wanted) > 20
    assert index.query(queries, 5).tolist() == wanted
    assert index.query(queries, 5, threads=2).tolist() == wanted
    with pytest.raises(ValueError, match="more than max_pairs=3 pairs"):
        index.query(queries, 5, max_pairs=3)


@pytest.mark.parametrize(
    "hashes, error, message",
    [
        ([1, 2], TypeError, "hashes must be a uint64 array, got list"),
        (np.zeros(3, np.int64), TypeError, "hashes must be a uint64 array, got int64 array"),
        (np.zeros((2, 2), np.uint64), ValueError, r"hashes must have shape \(N,\), got \(2, 2\)"),
        (np.broadcast_to(np.uint64(1), (2**32,)), ValueError, "hashes must be at most 4,294,967,294"),
    ],
)
def test_bad_hashes_are_refused(hashes, error, message):
    for function in (near_duplicates, near_duplicate_groups, NearDuplicateIndex().add, NearDuplicateIndex().query):
        with pytest.raises(error, match=message):
            function(hashes)


@pytest.mark.parametrize("max_distance", [-1, 65, 3.0, True, None])
def test_bad_distances_are_refused(max_distance):
    with pytest.raises(ValueError, match="max_distance must be an int from 0 to 64, got"):
        near_duplicates(np.zeros(2, np.uint64), max_distance)


def test_other_bad_arguments_are_refused():
    hashes = np.zeros(2, np.uint64)
    with pytest.raises(ValueError, match="max_pairs must be an int from 0"):
        near_duplicates(hashes, max_pairs=-1)
    with pytest.raises(ValueError, match="threads must be an int from 1 to 4096"):
        near_duplicate_groups(hashes, threads=0)
