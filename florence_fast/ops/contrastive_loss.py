"""Contrastive loss between images and texts without a B x B matrix: UniCL, with CLIP as its special case.

Florence is pretrained with it (arXiv 2111.11432, section 2.2).

Letters: B pairs · R rows (images here) · N columns (texts of all) · D embedding dim · S = logit_scale * rows cols^T.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.errors import unknown
from florence_fast.ops import _backend, _contrastive_loss_torch

REDUCTIONS = {"mean_directions": 0.5, "sum_directions": 1.0}
"""What each direction's loss is multiplied with before the two are added."""


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
    *,
    reduction: str = "mean_directions",
    chunk_size: int | None = None,
) -> Tensor:
    """Pull each image towards the texts that describe it, and each text towards its images (UniCL).

    With P(i) = {k : y_k = y_i} and S = logit_scale * U V^T (section 2.2, averaged over the batch),
    ``L_i2t = -mean_i 1/|P(i)| sum_{k in P(i)} log softmax_k(S_ik)``, L_t2i the same over the columns; the loss is
    their sum in the paper and half of it in open_clip.

    Args:
        image_features: (B, D), floating, L2-normalised by the caller.
        text_features: (B, D), the dtype of ``image_features``; row i belongs to image i.
        logit_scale: one floating-point value, the factor of the cosines (not its log); a tensor gets its gradient.
        labels: (B,) int64, hashes of the texts: equal ones are positives of each other. None: only a pair's own
            text is right (CLIP).
        reduction: "mean_directions" or "sum_directions".
        chunk_size: edge of the tiles whose gradient is in memory at a time, which takes O(B D + chunk_size^2); by
            default 1024 in the ``torch`` backend, and in that of the kernels what suits the GPU, up to 8192.

    Returns:
        The loss, a scalar: float32, or float64 for float64 features. Autocast changes nothing.

    Raises:
        TypeError: an argument is no tensor, features are not floating, labels are not int64.
        ValueError: a shape, a device, a dtype or a name is wrong, or the batch is empty.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    A single pair has loss 0, equal labels everywhere the cross-entropy against the uniform distribution. Only the
    "reference" backend can be differentiated twice.

    >>> u, v = torch.eye(4), torch.eye(4)
    >>> contrastive_loss(u, v, logit_scale=100.0)
    tensor(0.)
    """
    scale = check_contrastive_loss(image_features, text_features, logit_scale, labels, reduction, chunk_size)
    arguments = (image_features, text_features, scale, labels)
    if _backend.choose("contrastive_loss", *arguments) == "reference":
        return contrastive_loss_reference(*arguments, reduction=reduction)
    if labels is None:
        labels = torch.arange(len(image_features), device=image_features.device)
    row_lse, col_lse, positive = contrastive_statistics(
        image_features, text_features, scale, labels, labels, chunk_size=chunk_size
    )
    return join_directions(row_lse.mean(), col_lse.mean(), positive.mean(), reduction)


def contrastive_statistics(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the loss needs to know of some rows of S against all columns: the part that costs time.

    The loss of a batch that is spread over processes is made of it: each brings its own rows. Arguments are checked
    by ``check_contrastive_loss``; the label of every row must occur among ``col_labels``.

    Args:
        rows: (R, D).
        cols: (N, D).
        scale: ().
        row_labels: (R,) int64.
        col_labels: (N,) int64.
        chunk_size: as in ``contrastive_loss``.

    Returns:
        log sum_k exp S_ik of each row, (R,); log sum_i exp S_ik of each column over these rows, (N,), -inf when there
        are none; the mean of S_ik over the positives k of each row, (R,). All in the dtype of the loss, and
        differentiable with respect to rows, cols and scale.
    """
    backend = _backend.choose("contrastive_loss", rows, cols, scale, row_labels)
    if backend == "reference":
        return contrastive_statistics_reference(rows, cols, scale, row_labels, col_labels)
    statistics, _ = _contrastive_loss(rows, cols, scale, row_labels, col_labels, chunk_size or 0, backend)
    return statistics.split([len(rows), len(cols), len(rows)])


def join_directions(row_lse: Tensor, col_lse: Tensor, positive: Tensor, reduction: str) -> Tensor:
    """Return the loss from the means of the three statistics over the batch.

    Positives are mutual, so 1/|P| is the same for both ends and the mean positive logit is one for both directions.
    """
    return REDUCTIONS[reduction] * ((row_lse - positive) + (col_lse - positive))


def check_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    reduction: str,
    chunk_size: int | None,
    *,
    may_be_empty: bool = False,
) -> Tensor:
    """Raise what is wrong with the arguments of ``contrastive_loss``; return the scale as a 0-D tensor."""
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if image_features.ndim != 2 or image_features.shape[1] == 0:
        raise ValueError(f"image_features must have shape (B, D), got {tuple(image_features.shape)}")
    if len(image_features) == 0 and not may_be_empty:
        raise ValueError("image_features must hold at least one pair, got an empty batch")
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(image_features, what), getattr(text_features, what)
        if wanted != got:
            raise ValueError(f"text_features must have the {what} of image_features, {wanted}, got {got}")
    device = image_features.device
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be an int64 tensor, got {got}")
        if labels.shape != image_features.shape[:1] or labels.device != device:
            raise ValueError(
                f"labels must have shape ({len(image_features)},) on {device}, "
                f"got {tuple(labels.shape)} on {labels.device}"
            )
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    if not isinstance(logit_scale, Tensor):
        return torch.tensor(float(logit_scale), dtype=image_features.dtype, device=device)
    if logit_scale.numel() != 1 or not logit_scale.is_floating_point() or logit_scale.device != device:
        raise ValueError(
            f"logit_scale must be one floating-point value on {device}, "
            f"got shape {tuple(logit_scale.shape)}, {logit_scale.dtype} on {logit_scale.device}"
        )
    return logit_scale.reshape(())


def contrastive_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
    *,
    reduction: str = "mean_directions",
    chunk_size: int | None = None,
) -> Tensor:
    """Define ``contrastive_loss`` in plain PyTorch by its B x B logits; ``chunk_size`` changes nothing."""
    logits = _logits(image_features, text_features, logit_scale)
    if labels is None:
        labels = torch.arange(len(logits), device=logits.device)
    target = F.normalize((labels[:, None] == labels).to(logits.dtype), p=1, dim=1)
    image_to_text = -(target * logits.log_softmax(1)).sum(1).mean()
    text_to_image = -(target * logits.log_softmax(0)).sum(0).mean()
    return REDUCTIONS[reduction] * (image_to_text + text_to_image)


def contrastive_statistics_reference(
    rows: Tensor, cols: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Define ``contrastive_statistics`` in plain PyTorch."""
    logits = _logits(rows, cols, scale)
    target = F.normalize((row_labels[:, None] == col_labels).to(logits.dtype), p=1, dim=1)
    return logits.logsumexp(1), logits.logsumexp(0), (target * logits).sum(1)


def _logits(rows: Tensor, cols: Tensor, scale: Tensor | float) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with _backend.without_autocast(rows.device.type):
        return scale * (rows.to(dtype) @ cols.to(dtype).T)


def unsupported_reasons(backend: str, image_features: Tensor, *args: Any, **options: Any) -> list[str]:
    """Say why ``backend`` cannot run ``contrastive_loss`` on these arguments; an empty list means that it can."""
    if backend == "triton":
        reasons = _backend.triton_reasons(image_features)
        if image_features.dtype not in _backend.TRITON_DTYPES:
            reasons.append(f"features must be float16, bfloat16 or float32, got {image_features.dtype}")
        if image_features.dtype == torch.bfloat16 and _backend.interpreting():
            reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
        return reasons
    if backend == "cpp":
        return ["no native kernel for contrastive_loss in this version"]
    return []


# The op returns the three statistics as one tensor (2R + N,), and keeps for the backward, beside its inputs, the two
# log-sum-exps: with them a tile of probabilities is recomputed from its features alone.
def _forward(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (rows, cols, scale, row_labels, col_labels)
    statistics = _implementation(backend).contrastive_loss_fwd(*tensors, chunk_size)
    return torch.cat(statistics), torch.cat(statistics[:2])


def _forward_fake(rows: Tensor, cols: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    num_lse = len(rows) + len(cols)
    return rows.new_empty(num_lse + len(rows), dtype=dtype), rows.new_empty(num_lse, dtype=dtype)


def _backward(
    grad_out: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    lse: Tensor,
    needs: list[bool],
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = [len(rows), len(cols)]
    grads = _implementation(backend).contrastive_loss_bwd(
        *grad_out.split([*sizes, len(rows)]),
        *(rows, cols, scale, row_labels, col_labels),
        *lse.split(sizes),
        needs,
        chunk_size,
    )
    return tuple(rows.new_empty(0) if grad is None else grad for grad in (*grads, None, None))


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, needs = args[:5], args[6]
    return tuple(
        x.new_empty(x.shape) if need else tensors[0].new_empty(0) for x, need in zip(tensors, needs, strict=True)
    )


def _example(device: str) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    features = F.normalize(torch.randn(2, 6, 8, device=device), dim=-1)
    labels = torch.tensor([3, 1, 3, 4, 1, 3], device=device)
    return (*features, torch.tensor(10.0, device=device), labels), {}


def _implementation(backend: str) -> ModuleType:
    """Return the module of a backend; that of the kernels needs triton, so it is imported where it is used."""
    if backend == "triton":
        from florence_fast.ops import _contrastive_loss_triton

        return _contrastive_loss_triton
    return _contrastive_loss_torch


_contrastive_loss = _backend.define("contrastive_loss", 5, _forward, _forward_fake, _backward, _backward_fake)
_backend.register_entry(
    _backend.OpEntry("contrastive_loss", contrastive_loss, contrastive_loss_reference, unsupported_reasons, _example)
)
