"""Sigmoid loss between images and texts without a B x B matrix (SigLIP, arXiv 2303.15343, equation 2 and section 3).

Every pair of an image and a text is judged alone, so a text may have any number of images, and no sum over the batch
stands between the processes of a distributed run.

Letters: B pairs · R rows (images here) · N columns (texts) · D embedding dim · S = logit_scale * rows cols^T + bias.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops import dispatch
from florence_fast.ops.logits.checks import (
    all_logits,
    check_features,
    check_labels,
    check_scalar,
    cpp_reasons,
    labels_of_both,
    triton_reasons,
)
from florence_fast.ops.spec import Op


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    labels: Tensor | None = None,
    *,
    text_labels: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Tell for each image and each text whether they belong together (SigLIP).

    ``-1/B sum_ij log sigmoid(z_ij S_ij)`` with z_ij = 1 where y_i = y_j and -1 elsewhere.

    Args:
        image_features: (B, D), floating, L2-normalised by the caller.
        text_features: (N, D), the dtype of ``image_features``; row i belongs to image i unless there are labels.
        logit_scale: one floating-point value, the factor of the cosines (not its log); a tensor gets its gradient.
        logit_bias: one floating-point value, added to every logit; a tensor gets its gradient.
        labels: (B,) int64: equal ones are positives. None: only a pair's own text is right.
        text_labels: (N,) int64, if the texts' labels are others than ``labels``.
        chunk_size: edge of the tiles whose gradient is in memory at a time, as in ``contrastive_loss``.

    Returns:
        The loss, a scalar: float32, or float64 for float64 features. Autocast changes nothing.

    Raises:
        TypeError: an argument is no tensor, features are not floating, labels are not int64.
        ValueError: a shape, a device or a dtype is wrong, or the batch is empty.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    Second derivatives are the reference's.

    >>> u = torch.eye(2)
    >>> sigmoid_loss(u, u, logit_scale=20.0, logit_bias=-10.0)   # every logit is +10 or -10, and all are right
    tensor(9.0798e-05)
    """
    scale = check_features(image_features, text_features, logit_scale, chunk_size, unequal=True)
    bias = check_scalar("logit_bias", logit_bias, image_features)
    check_labels(image_features, text_features, labels, text_labels, unequal=True)
    if dispatch.choose("sigmoid_loss", image_features) == "reference":
        return sigmoid_loss_reference(image_features, text_features, scale, bias, labels, text_labels=text_labels)
    both = labels_of_both(image_features, text_features, labels, text_labels)
    return sigmoid_loss_of_rows(image_features, text_features, scale, bias, *both, chunk_size=chunk_size).mean()


def sigmoid_loss_of_rows(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Return -sum_j log sigmoid(z_ij S_ij) for every row i, (R,) in the dtype of the loss; arguments are checked."""
    backend = dispatch.choose("sigmoid_loss", rows)
    tensors = (rows, cols, scale, bias, row_labels, col_labels)
    if backend == "reference":
        return _rows_reference(*tensors)
    return _sigmoid_loss(*tensors, chunk_size or 0, backend)


def sigmoid_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    labels: Tensor | None = None,
    *,
    text_labels: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Define ``sigmoid_loss`` in plain PyTorch by its B x N logits; ``chunk_size`` changes nothing."""
    both = labels_of_both(image_features, text_features, labels, text_labels)
    return _rows_reference(image_features, text_features, logit_scale, logit_bias, *both).mean()


def _rows_reference(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    row_labels: Tensor,
    col_labels: Tensor,
) -> Tensor:
    logits = all_logits(rows, cols, scale) + bias
    return -F.logsigmoid(torch.where(row_labels[:, None] == col_labels, logits, -logits)).sum(1)


def _arguments(*inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return inputs[:5], {}


def _differentiable_rows(*inputs: Any) -> Tensor:
    """Define the result of the op."""
    return _rows_reference(*inputs[:6])


def _outputs(rows: Tensor, *args: Any) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))


def _example(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    features = F.normalize(torch.randn(2, 6, 8, device=device), dim=-1)
    scalars = (torch.tensor(value, device=device) for value in (10.0, -5.0))
    return (*features, *scalars, torch.tensor([3, 1, 3, 4, 1, 3], device=device)), {}


_sigmoid_loss = Op(
    sigmoid_loss,
    sigmoid_loss_reference,
    example=_example,
    reasons={"triton": triton_reasons, "cpp": cpp_reasons},
    tensors=6,
    outputs=_outputs,
    arguments=_arguments,
    definition=_differentiable_rows,
)
