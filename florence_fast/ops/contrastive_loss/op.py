"""Contrastive loss between images and texts without a B x B matrix: UniCL, with CLIP as its special case.

Florence is pretrained with it (arXiv 2111.11432, section 2.2).

Letters: B pairs · R rows (images here) · N columns (texts of all) · D embedding dim · S = logit_scale * rows cols^T.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.errors import unknown
from florence_fast.ops import dispatch
from florence_fast.ops.logits.checks import (
    all_logits,
    check_features,
    check_labels,
    cpp_reasons,
    labels_of_both,
    triton_reasons,
)
from florence_fast.ops.spec import Op

REDUCTIONS = {"mean_directions": (0.5, 0.5), "sum_directions": (1.0, 1.0), "image_to_text": (1.0, 0.0)}
"""What the loss of the rows (image to text) and that of the columns (text to image) are multiplied with."""


class Statistics(NamedTuple):
    """What the loss needs to know of S. The maxima have no gradient: that of a log-sum-exp is all in its ``rest``.

    The log of sum exp S is kept in two parts, ``top + rest``, because near a loss of 0 it is a maximum that a positive
    cancels: ``(top - positive) + rest`` is exact there, and the rounded sum of both parts is not.
    """

    row_top: Tensor
    """(R,): max_k S_ik."""
    row_rest: Tensor
    """(R,): log sum_k exp(S_ik - row_top_i)."""
    col_top: Tensor
    """(N,): max_i S_ik over these rows, -inf if there are none."""
    col_rest: Tensor
    """(N,): log sum_i exp(S_ik - col_top_k)."""
    positive: Tensor
    """(R,): the sum of S_ik over the positives k of row i, times the weight of the row."""


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
    *,
    text_labels: Tensor | None = None,
    reduction: str = "mean_directions",
    chunk_size: int | None = None,
) -> Tensor:
    """Pull each image towards the texts that describe it, and each text towards its images (UniCL).

    With P(i) = {k : y_k = y_i} and S = logit_scale * U V^T (section 2.2, averaged over the batch),
    ``L_i2t = -mean_i 1/|P(i)| sum_{k in P(i)} log softmax_k(S_ik)``, L_t2i the same over the columns; the loss is
    their sum in the paper and half of it in open_clip.

    Args:
        image_features: (B, D), floating, L2-normalised by the caller.
        text_features: (B, D), the dtype of ``image_features``; row i belongs to image i. For "image_to_text" there may
            be N texts, not B.
        logit_scale: one floating-point value, the factor of the cosines (not its log); a tensor gets its gradient.
        labels: (B,) int64, hashes of the texts: equal ones are positives of each other. None: only a pair's own
            text is right (CLIP), and texts after the first B are wrong for all.
        text_labels: (N,) int64, if the texts' labels are others than ``labels``, for "image_to_text" alone. An image
            without a positive makes the loss NaN.
        reduction: "mean_directions", "sum_directions", or "image_to_text" for that direction alone; the other one is
            had by exchanging the arguments.
        chunk_size: edge of the tiles whose gradient is in memory at a time, which takes O(B D + chunk_size^2); by
            default 4096 in the ``torch`` backend, 2048 in ``cpp``, and in that of Triton's kernels what suits the GPU,
            up to 8192.

    Returns:
        The loss, a scalar: float32, or float64 for float64 features. Autocast changes nothing.

    Raises:
        TypeError: an argument is no tensor, features are not floating, labels are not int64.
        ValueError: a shape, a device, a dtype or a name is wrong, or the batch is empty.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    A single pair has loss 0, equal labels everywhere the cross-entropy against the uniform distribution. Second
    derivatives are the reference's.

    >>> u, v = torch.eye(4), torch.eye(4)
    >>> contrastive_loss(u, v, logit_scale=100.0)
    tensor(0.)
    """
    check_reduction(reduction)
    one_way = reduction == "image_to_text"
    scale = check_features(image_features, text_features, logit_scale, chunk_size, unequal=one_way)
    check_labels(image_features, text_features, labels, text_labels, unequal=one_way)
    arguments = (image_features, text_features, scale, labels)
    if dispatch.choose("contrastive_loss", *arguments) == "reference":
        return contrastive_loss_reference(*arguments, text_labels=text_labels, reduction=reduction)
    row_labels, col_labels = labels_of_both(image_features, text_features, labels, text_labels)
    statistics = contrastive_statistics(
        image_features,
        text_features,
        scale,
        row_labels,
        col_labels,
        positive_weight(row_labels, col_labels, torch.promote_types(image_features.dtype, torch.float32)),
        chunk_size=chunk_size,
    )
    return join_directions(statistics, statistics.positive, reduction)


def contrastive_statistics(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    weight: Tensor,
    *,
    chunk_size: int | None = None,
) -> Statistics:
    """Return what the loss needs to know of some rows of S against some columns: the part that costs time.

    The loss of a batch that is spread over processes is made of it: each brings its own rows. Arguments are checked
    by ``check_features`` and ``check_labels``.

    Args:
        rows: (R, D).
        cols: (N, D).
        scale: ().
        row_labels: (R,) int64.
        col_labels: (N,) int64.
        weight: (R,), what the sum of a row's positives is multiplied with, in the dtype of the loss; no gradient.
        chunk_size: as in ``contrastive_loss``.

    Returns:
        In the dtype of the loss, and differentiable with respect to rows, cols and scale as ``Statistics`` says.
    """
    backend = dispatch.choose("contrastive_loss", rows, cols, scale, row_labels)
    tensors = (rows, cols, scale, row_labels, col_labels, weight)
    if backend == "reference":
        return contrastive_statistics_reference(*tensors)
    differentiable, tops, _ = _contrastive_loss(*tensors, chunk_size or 0, backend)
    row_rest, col_rest, positive = differentiable.split([len(rows), len(cols), len(rows)])
    row_top, col_top = tops.split([len(rows), len(cols)])
    return Statistics(row_top, row_rest, col_top, col_rest, positive)


def positive_weight(row_labels: Tensor, col_labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/|P(i)| for every row, counted in the sorted labels without comparing all pairs."""
    ordered = col_labels.sort().values
    count = torch.searchsorted(ordered, row_labels, right=True) - torch.searchsorted(ordered, row_labels)
    return count.to(dtype).reciprocal()


def join_directions(statistics: Statistics, col_positive: Tensor, reduction: str) -> Tensor:
    """Return the loss from the statistics of all rows and all columns.

    Positives are mutual, so 1/|P| is the same for both ends, and the positives of the columns are those of the rows in
    another order: ``col_positive`` is (N,), each column having its own pair's, which is what ``col_top`` cancels with.
    """
    row_top, row_rest, col_top, col_rest, positive = statistics
    of_rows, of_cols = REDUCTIONS[reduction]
    loss = of_rows * ((row_top - positive) + row_rest).mean()
    return loss if of_cols == 0 else loss + of_cols * ((col_top - col_positive) + col_rest).mean()


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless ``reduction`` is known."""
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)


def contrastive_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
    *,
    text_labels: Tensor | None = None,
    reduction: str = "mean_directions",
    chunk_size: int | None = None,
) -> Tensor:
    """Define ``contrastive_loss`` in plain PyTorch by its B x B logits; ``chunk_size`` changes nothing."""
    logits = all_logits(image_features, text_features, logit_scale)
    row_labels, col_labels = labels_of_both(image_features, text_features, labels, text_labels)
    same = row_labels[:, None] == col_labels
    target = same / same.sum(1, keepdim=True, dtype=logits.dtype)
    of_rows, of_cols = REDUCTIONS[reduction]
    # The factor is applied to a vector: torch.func.jvp makes the tangent of a number times a factor float64.
    loss = (-of_rows * (target * logits.log_softmax(1)).sum(1)).mean()
    return loss if of_cols == 0 else loss - (of_cols * (target * logits.log_softmax(0)).sum(0)).mean()


def contrastive_statistics_reference(
    rows: Tensor, cols: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor, weight: Tensor
) -> Statistics:
    """Define ``contrastive_statistics`` in plain PyTorch."""
    logits = all_logits(rows, cols, scale)
    same = row_labels[:, None] == col_labels
    row_top, col_top = (_amax(logits.detach(), axis) for axis in (1, 0))
    row_rest, col_rest = (logits - row_top[:, None]).logsumexp(1), (logits - col_top).logsumexp(0)
    return Statistics(row_top, row_rest, col_top, col_rest, weight * (same * logits).sum(1))


def _amax(x: Tensor, axis: int) -> Tensor:
    return x.amax(axis) if x.shape[axis] else x.new_full((x.shape[1 - axis],), -torch.inf)


def _arguments(*inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return inputs[:4], {}


def _differentiable_statistics(*inputs: Any) -> Tensor:
    """Define the first result of the op."""
    _, row_rest, _, col_rest, positive = contrastive_statistics_reference(*inputs[:6])
    return torch.cat([row_rest, col_rest, positive])


# The op returns what has a gradient as one tensor (2R + N,), the maxima (R + N,), and for the backward alone the
# log-sum-exps (R + N,): with them a tile of probabilities is recomputed from its features.
def _forward(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    weight: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (rows, cols, scale, row_labels, col_labels, weight)
    find = _contrastive_loss.backend(backend).contrastive_loss_fwd
    row_top, row_rest, col_top, col_rest, positive = find(*tensors, chunk_size)
    tops, rests = torch.cat([row_top, col_top]), torch.cat([row_rest, col_rest])
    return torch.cat([rests, positive]), tops, tops + rests


def _outputs(rows: Tensor, cols: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_lse, weight = len(rows) + len(cols), args[3]
    return tuple(weight.new_empty(length) for length in (num_lse + len(rows), num_lse, num_lse))


def _backward(
    grad_out: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    weight: Tensor,
    tops: Tensor,
    lse: Tensor,
    needs: list[bool],
    chunk_size: int,
    backend: str,
) -> tuple[Tensor | None, ...]:
    sizes = [len(rows), len(cols)]
    return _contrastive_loss.backend(backend).contrastive_loss_bwd(
        *grad_out.split([*sizes, len(rows)]),
        *(rows, cols, scale, row_labels, col_labels, weight),
        *lse.split(sizes),
        needs,
        chunk_size,
    )


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    features = F.normalize(torch.randn(2, 6, 8, device=device), dim=-1)
    labels = torch.tensor([3, 1, 3, 4, 1, 3], device=device)
    return (*features, torch.tensor(10.0, device=device), labels), {}


_contrastive_loss = Op(
    contrastive_loss,
    contrastive_loss_reference,
    example=_example,
    reasons={"triton": triton_reasons, "cpp": cpp_reasons},
    tensors=6,
    outputs=_outputs,
    forward=_forward,
    backward=_backward,
    arguments=_arguments,
    definition=_differentiable_statistics,
)
