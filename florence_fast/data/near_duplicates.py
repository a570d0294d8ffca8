"""Which of millions of 64-bit hashes differ in few bits: near-duplicates, by the hashes of perceptual_hash.

Exact, by multi-index hashing: hashes that differ in at most d bits agree in one of d + 1 bands of bits, so only those
that share a band are compared. Large buckets are split again in the same way, so that neither many hashes nor
images that have much in common (a white border) make the search quadratic. Memory: about 60 bytes a hash, and 40
a pair. Where the native extension is absent, NumPy finds the same, slower.
Letters: N hashes · P pairs · Q queries.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from florence_fast import native
from florence_fast.data.threads import number_of_threads

MAX_HASHES = 2**32 - 2
MAX_PAIRS = 10_000_000


def near_duplicates(
    hashes: np.ndarray, max_distance: int = 3, *, threads: int | None = None, max_pairs: int = MAX_PAIRS
) -> np.ndarray:
    """Find all pairs of hashes at most ``max_distance`` bits apart.

    Args:
        hashes: uint64 (N,).
        max_distance: from 0 to 64. A million random hashes took 0.2 s at 3, 0.8 s at 6, 1.9 s at 8, on one thread;
            with much larger distances nothing but comparing all with all is left.
        threads: None for torch's number; the result does not depend on it.
        max_pairs: with more pairs than this the search stops with an error.

    Returns:
        int64 (P, 3): rows i, j, distance with i < j, sorted by i, then j.

    Raises:
        TypeError: ``hashes`` is no uint64 array.
        ValueError: it has more than one axis; an argument is out of range; there are more than ``max_pairs`` pairs.

    >>> near_duplicates(np.array([0, 7, 8], dtype=np.uint64), 3).tolist()
    [[0, 1, 3], [0, 2, 1]]
    """
    _check_hashes("hashes", hashes)
    _check_limits(max_distance, max_pairs)
    threads, module = number_of_threads(threads), native.extension()
    if module:
        pairs = module.near_duplicates(threads, np.ascontiguousarray(hashes), max_distance, max_pairs)
    else:
        pairs = _collect(_search(hashes, max_distance), max_pairs)
    return _within_limit(pairs, max_distance, max_pairs)


def near_duplicate_groups(hashes: np.ndarray, max_distance: int = 3, *, threads: int | None = None) -> np.ndarray:
    """Group hashes that a chain of near-duplicates connects.

    No pair is stored, so this takes any number of them; ``labels == np.arange(N)`` keeps one of each group. Two
    hashes of one group may be further apart than ``max_distance``: the chain between them is not.

    Args:
        hashes: uint64 (N,).
        max_distance: from 0 to 64, as for near_duplicates.
        threads: None for torch's number; the result does not depend on it.

    Returns:
        int64 (N,): labels, for each hash the smallest index in its group.

    Raises:
        TypeError, ValueError: as near_duplicates.

    >>> near_duplicate_groups(np.array([9, 0, 7, 0], dtype=np.uint64), 1).tolist()
    [0, 1, 2, 1]
    """
    _check_hashes("hashes", hashes)
    _check_limits(max_distance, 1)
    threads, module = number_of_threads(threads), native.extension()
    if module:
        return module.near_duplicate_groups(threads, np.ascontiguousarray(hashes), max_distance)
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # different hashes by where they first occur, so that the smallest number is the first
    labels = np.arange(len(values))
    for a, b, _ in _search(values[order], max_distance):
        labels = _join(labels, a, b)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order][labels][number][inverse.reshape(-1)]


def near_duplicates_reference(hashes: np.ndarray, max_distance: int = 3) -> list[tuple[int, int, int]]:
    """Compare all hashes with all: the definition of near_duplicates, in plain Python."""
    values = [int(value) for value in hashes]
    return [
        (i, j, (values[i] ^ values[j]).bit_count())
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= max_distance
    ]


class NearDuplicateIndex:
    """Hashes to which more are added, asked for those near to new ones.

    A query passes over every hash: 0.07 to 0.15 ms a query among a million hashes, natively on one thread.
    To find the pairs among very many at once, near_duplicates is the faster.

    >>> index = NearDuplicateIndex()
    >>> index.add(np.array([0, 255], dtype=np.uint64)).tolist()
    [0, 1]
    >>> index.query(np.array([254], dtype=np.uint64), 3).tolist()
    [[0, 1, 1]]
    """

    def __init__(self) -> None:
        self._room, self._count = np.empty(1024, np.uint64), 0

    def __len__(self) -> int:
        return self._count

    @property
    def hashes(self) -> np.ndarray:
        """What was added, in order: uint64 (N,), not to be written to."""
        view = self._room[: self._count]
        view.flags.writeable = False
        return view

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add uint64 (M,) and return the numbers under which a query will name them: int64 (M,)."""
        _check_hashes("hashes", hashes)
        begin, end = self._count, self._count + len(hashes)
        if end > MAX_HASHES:
            raise ValueError(f"an index holds at most {MAX_HASHES:,} hashes, got {end:,}")
        if end > len(self._room):
            room = np.empty(max(end, 2 * len(self._room)), np.uint64)
            room[:begin] = self._room[:begin]
            self._room = room
        self._room[begin:end], self._count = hashes, end
        return np.arange(begin, end)

    def query(
        self, hashes: np.ndarray, max_distance: int = 3, *, threads: int | None = None, max_pairs: int = MAX_PAIRS
    ) -> np.ndarray:
        """Find all that were added at most ``max_distance`` bits from any of ``hashes``, uint64 (Q,).

        Returns:
            int64 (P, 3): rows query, number, distance, sorted.

        Raises:
            TypeError, ValueError: as near_duplicates.
        """
        _check_hashes("hashes", hashes)
        _check_limits(max_distance, max_pairs)
        threads, module = number_of_threads(threads), native.extension()
        if module:
            found = module.near_matches(threads, np.ascontiguousarray(hashes), self.hashes, max_distance, max_pairs)
        else:
            found = _collect(_compare(hashes, self.hashes, max_distance), max_pairs)
        return _within_limit(found, max_distance, max_pairs)


Found = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _search(values: np.ndarray, max_distance: int) -> Found:
    """Yield pairs (i, j, distance) with i < j in arrays, each pair once: in the first band in which it agrees."""
    edges = [64 * band // (max_distance + 1) for band in range(max_distance + 2)]
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    for band, mask in enumerate(masks):
        order = np.argsort(values & mask, kind="stable")
        keys = (values & mask)[order]
        left, apart = np.arange(len(keys)), 1
        while left.size:  # pairs `apart` places from each other in the order of their bands
            left = left[: np.searchsorted(left, len(keys) - apart)]
            left = left[keys[left] == keys[left + apart]]
            a, b = order[left], order[left + apart]
            differing = values[a] ^ values[b]
            distance = _bit_count(differing)
            close = distance <= max_distance
            for earlier in masks[:band]:
                close &= differing & earlier != 0
            a, b = a[close], b[close]
            yield np.minimum(a, b), np.maximum(a, b), distance[close]
            apart += 1


def _compare(queries: np.ndarray, hashes: np.ndarray, max_distance: int) -> Found:
    for number, query in enumerate(queries):
        distance = _bit_count(hashes ^ query)
        near = np.flatnonzero(distance <= max_distance)
        yield np.full(len(near), number), near, distance[near]


def _collect(found: Found, max_pairs: int) -> np.ndarray | None:
    parts, total = [np.empty((0, 3), np.int64)], 0
    for a, b, distance in found:
        total += len(a)
        if total > max_pairs:
            return None
        if len(a):
            parts.append(np.stack([a, b, distance], axis=1))
    pairs = np.concatenate(parts)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _join(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Unite the groups of a[k] and b[k]; labels are the smallest members, before and after."""
    while len(a):
        low, high = np.minimum(labels[a], labels[b]), np.maximum(labels[a], labels[b])
        np.minimum.at(labels, high, low)
        while (labels != labels[labels]).any():
            labels = labels[labels]
        apart = labels[a] != labels[b]
        a, b = a[apart], b[apart]
    return labels


def _bit_count(values: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1)
    return bits.sum(axis=1, dtype=np.int64)


def _check_hashes(name: str, hashes: np.ndarray) -> None:
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64:
        got = f"{hashes.dtype} array" if isinstance(hashes, np.ndarray) else type(hashes).__name__
        raise TypeError(f"{name} must be a uint64 array, got {got}")
    if hashes.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {hashes.shape}")
    if len(hashes) > MAX_HASHES:
        raise ValueError(f"{name} must be at most {MAX_HASHES:,}, got {len(hashes):,}")


def _check_limits(max_distance: int, max_pairs: int) -> None:
    for name, value, most in (("max_distance", max_distance, 64), ("max_pairs", max_pairs, 2**40)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name} must be an int from 0 to {most}, got {value!r}")


def _within_limit(pairs: np.ndarray | None, max_distance: int, max_pairs: int) -> np.ndarray:
    if pairs is None:
        raise ValueError(
            f"there are more than max_pairs={max_pairs:,} pairs within max_distance={max_distance}: take "
            "near_duplicate_groups, which stores none, a smaller distance, or raise the limit"
        )
    return pairs
