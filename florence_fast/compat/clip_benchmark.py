"""A model type for clip_benchmark, whose plug-ins are functions from a name to a model, its transform and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from florence_fast.compat.open_clip import create_model_and_transforms, get_tokenizer


def load(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[[str | list[str]], Tensor]]:
    """Load a dual encoder the way that clip_benchmark asks for one.

    Args:
        model_name: one of ours or of open_clip's, as `florence_fast.create_model` takes it.
        pretrained: a tag, a directory or a file; None and "" draw the weights.
        cache_dir: where open_clip puts what it downloads; ours need none.
        device: where the model goes.

    Returns:
        ``(model in evaluation mode, transform of images for evaluation, tokenizer)``.

    Raises:
        ValueError: an unknown model or tag, or an image tower, which reads no text.

    >>> clip_benchmark.models.TYPE2FUNC["florence_fast"] = load   # then --model_type florence_fast
    """
    tokenizer = get_tokenizer(model_name)
    model, _, transform = create_model_and_transforms(
        model_name, pretrained or None, device=device, cache_dir=cache_dir
    )
    return model.eval(), transform, tokenizer
