"""Ranks and recalls where a query may have several right answers.

Letters: Q queries · G gallery · D embedding dim · P right (query, gallery) pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1024  # queries scored at once: a chunk of scores against 100,000 answers stays below 0.5 GB


def ranks(queries: Tensor, gallery: Tensor, pairs: Tensor, *, chunk_size: int = CHUNK) -> Tensor:
    """Count, for each query, the wrong answers that score at least as high as its best right one.

    A rank of 0 is a hit at the first place. Ties count against the model, so one that gives every answer the
    same score is last everywhere and not first.

    Args:
        queries: (Q, D) normalised features.
        gallery: (G, D) normalised features of the possible answers.
        pairs: (P, 2) int64, rows (query, gallery index) of what is right.
        chunk_size: queries that are scored at once; changes memory, never the result.

    Returns:
        (Q,) int64 ranks, from 0.

    Raises:
        ValueError: A feature is NaN or infinite, or a query has no right answer.

    >>> ranks(torch.eye(2), torch.eye(2), torch.tensor([[0, 0], [1, 0]]))
    tensor([0, 1])
    """
    for name, features in (("queries", queries), ("gallery", gallery)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: the model's weights are broken")
    answered = torch.bincount(pairs[:, 0], minlength=len(queries))
    if (answered == 0).any():
        lonely = int((answered == 0).nonzero()[0])
        raise ValueError(f"every query needs at least one right answer, query {lonely} has none")

    found = torch.empty(len(queries), dtype=torch.int64, device="cpu")
    for start in range(0, len(queries), chunk_size):
        scores_QG = queries[start : start + chunk_size].float() @ gallery.float().T
        here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(scores_QG))]
        right_QG = torch.zeros_like(scores_QG, dtype=torch.bool)
        right_QG[here[:, 0] - start, here[:, 1]] = True
        best_Q1 = scores_QG.masked_fill(~right_QG, -torch.inf).amax(1, keepdim=True)
        found[start : start + len(scores_QG)] = ((scores_QG >= best_Q1) & ~right_QG).sum(1).cpu()
    return found


def recalls(found: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return the share of queries whose best right answer is among the first k: ``{"r1": ..., "r5": ...}``."""
    return {f"r{k}": (found < k).double().mean().item() for k in at}
