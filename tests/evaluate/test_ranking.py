"""Ranks and recalls against a slow count that a reader can check by eye."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florence_fast.evaluate.ranking import ranks, recalls


def slow_rank(scores: list[float], right: set[int]) -> int:
    best = max(scores[i] for i in right)
    return sum(score >= best for i, score in enumerate(scores) if i not in right)


@given(st.integers(1, 7), st.integers(2, 9), st.integers(0, 10_000), st.integers(1, 4))
def test_ranks_equal_a_slow_count_for_every_chunk_size(num_queries, num_gallery, seed, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are common.
    queries = torch.randint(-1, 2, (num_queries, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (num_gallery, 3), generator=generator).float()
    right = {(q, int(torch.randint(num_gallery, (), generator=generator))) for q in range(num_queries) for _ in "ab"}

    found = ranks(queries, gallery, torch.tensor(sorted(right)), chunk_size=chunk_size)

    scores = (queries @ gallery.T).tolist()
    assert found.tolist() == [slow_rank(scores[q], {g for p, g in right if p == q}) for q in range(num_queries)]


def test_a_model_without_opinion_is_last_and_not_first():
    found = ranks(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([[0, 0], [1, 3]]))
    assert found.tolist() == [4, 4]
    assert recalls(found, at=(1, 5)) == {"r1": 0.0, "r5": 1.0}


def test_nan_features_are_refused():
    with pytest.raises(ValueError, match=r"queries must be finite"):
        ranks(torch.full((1, 2), float("nan")), torch.ones(2, 2), torch.tensor([[0, 0]]))


def test_a_query_without_a_right_answer_is_refused():
    with pytest.raises(ValueError, match=r"query 1 has none"):
        ranks(torch.eye(2), torch.eye(2), torch.tensor([[0, 0]]))
