"""Chance as a function: what is drawn for a pair depends on (seed, epoch, index) and on nothing that happened before.

No generator is carried along, so any position can be resumed, and any number of workers and ranks draws the same.
Letters: N pairs · K draws for each.
"""

import numpy as np

# What a draw is for: streams of one seed that do not resemble each other.
ORDER, GROUPS, TEXT, CROP = 0, 1, 16, 32


def random_bits(seed: int, stream: int, epoch: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """Hash (seed, stream, epoch, index) to 64 bits with SplitMix64's finaliser, one part after another.

    Args:
        seed: any int.
        stream: what the bits are for.
        epoch: int, or int64 (N,).
        index: int64 (N,), the pair's number in the data set.

    Returns:
        uint64 (N,), the same with every version of NumPy and on every machine.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in (np.asarray(seed % 2**64, dtype=np.uint64), stream, epoch, index):
        state = _mix(state ^ np.asarray(part).astype(np.uint64))
    return state


def uniform(seed: int, stream: int, epoch: int | np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """Draw K = ``count`` numbers in [0, 1) for each pair: float64 (N, K)."""
    columns = [random_bits(seed, stream + number, epoch, index) for number in range(count)]
    return (np.stack(columns, axis=1) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, size: int, text_ids: np.ndarray | None = None, per_text: int = 1) -> np.ndarray:
    """Order the pairs of one epoch, each of them once.

    With ``per_text`` > 1, pairs of one text come in groups of that many, so that a batch holds several positives of
    a text (Florence, section 2.2); which images meet in a group, and the order of the groups, change with the
    epoch. A text whose pairs do not divide evenly has one smaller group.

    Args:
        seed: of the run.
        epoch: which pass over the data, from 0.
        size: number of pairs, N.
        text_ids: int64 (N,), equal for equal texts; needed with ``per_text`` > 1.
        per_text: images of a text that come one after another.

    Returns:
        int64 (N,), a permutation of 0 .. N-1.

    Raises:
        ValueError: ``per_text`` > 1 without ``text_ids``.
    """
    everything = np.arange(size)
    shuffled = random_bits(seed, ORDER, epoch, everything)
    if per_text == 1:
        return np.argsort(shuffled, kind="stable")
    if text_ids is None:
        raise ValueError(f"text_ids are needed with per_text={per_text}, got None")
    by_text = np.lexsort((shuffled, text_ids))
    first_of_text = np.flatnonzero(np.diff(text_ids[by_text], prepend=-1))
    rank_in_text = everything - np.repeat(first_of_text, np.diff(first_of_text, append=size))
    group_head = by_text[everything - rank_in_text % per_text]
    return by_text[np.argsort(random_bits(seed, GROUPS, epoch, group_head), kind="stable")]


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: one step and its finaliser, modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
