"""What both contrastive losses, over softmax and over sigmoid, ask of their arguments.

Letters: B pairs · R images · N texts · D embedding dim
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch


def check_features(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    chunk_size: int | None,
    *,
    unequal: bool = False,
    may_be_empty: bool = False,
) -> Tensor:
    """Raise what is wrong with features, scale or chunk size; return the scale as a 0-D tensor.

    ``unequal``: there may be other numbers of images and texts.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if image_features.ndim != 2 or image_features.shape[1] == 0:
        raise ValueError(f"image_features must have shape (B, D), got {tuple(image_features.shape)}")
    if len(image_features) == 0 and not may_be_empty:
        raise ValueError("image_features must hold at least one pair, got an empty batch")
    if unequal and (text_features.ndim != 2 or text_features.shape[1] != image_features.shape[1]):
        wanted = f"(N, {image_features.shape[1]})"
        raise ValueError(f"text_features must have shape {wanted}, got {tuple(text_features.shape)}")
    for what in ("dtype", "device") if unequal else ("shape", "dtype", "device"):
        wanted, got = getattr(image_features, what), getattr(text_features, what)
        if wanted != got:
            raise ValueError(f"text_features must have the {what} of image_features, {wanted}, got {got}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    return check_scalar("logit_scale", logit_scale, image_features)


def check_scalar(name: str, value: Tensor | float, image_features: Tensor) -> Tensor:
    """Return one floating-point value as a 0-D tensor beside ``image_features``, or raise what is wrong with it."""
    device = image_features.device
    if not isinstance(value, Tensor):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        return torch.tensor(float(value), dtype=dtype, device=device)
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        raise ValueError(
            f"{name} must be one floating-point value on {device}, "
            f"got shape {tuple(value.shape)}, {value.dtype} on {value.device}"
        )
    return value.reshape(())


def check_labels(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    *,
    unequal: bool = False,
) -> None:
    """Raise what is wrong with the labels of images and texts; ``unequal``: they may differ."""
    device = image_features.device
    for name, y, count in (("labels", labels, len(image_features)), ("text_labels", text_labels, len(text_features))):
        if y is None:
            continue
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {got}")
        if y.shape != (count,) or y.device != device:
            raise ValueError(f"{name} must have shape ({count},) on {device}, got {tuple(y.shape)} on {y.device}")
    if text_labels is not None and not unequal:
        raise ValueError("text_labels must be None for a loss of both directions, where a pair has one label")
    if text_labels is not None and labels is None:
        raise ValueError("labels must be given when text_labels are")
    if text_labels is None and labels is not None and len(labels) != len(text_features):
        raise ValueError(f"text_labels must be given, one for each of the {len(text_features)} texts")
    if labels is None and len(text_features) < len(image_features):
        raise ValueError(
            f"text_features must hold at least the {len(image_features)} texts that belong to the images, "
            f"got {len(text_features)}"
        )


def labels_of_both(
    image_features: Tensor, text_features: Tensor, labels: Tensor | None, text_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a label for every image, and one for every text."""
    if labels is None:
        own = torch.arange(len(text_features), device=image_features.device)
        return own[: len(image_features)], own
    return labels, labels if text_labels is None else text_labels


def triton_reasons(image_features: Tensor, *_: Any, **__: Any) -> list[str]:
    """Say why no Triton kernel can run a loss of these features; an empty list means that one can."""
    reasons = dispatch.triton_reasons(image_features)
    if image_features.dtype not in dispatch.TRITON_DTYPES:
        reasons.append(f"features must be float16, bfloat16 or float32, got {image_features.dtype}")
    if image_features.dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
    return reasons


def cpp_reasons(image_features: Tensor, *_: Any, **__: Any) -> list[str]:
    """Say why no native kernel can."""
    return native.reasons(image_features)


def all_logits(rows: Tensor, cols: Tensor, scale: Tensor | float) -> Tensor:
    """Return scale * rows cols^T, (R, N), in at least float32: what only the definitions hold in memory."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with dispatch.without_autocast(rows.device.type):
        return scale * (rows.to(dtype) @ cols.to(dtype).T)
