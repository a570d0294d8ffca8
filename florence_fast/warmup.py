"""Run a model once, so that its kernels are compiled and stored in Triton's cache on disk.

Letters: B pairs of a batch · L context length · S side of the images
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from florence_fast.models import create_model
from florence_fast.models.config import FlorenceConfig
from florence_fast.models.registry import ModelConfig
from florence_fast.ops import contrastive_loss
from florence_fast.precision import autocast, input_dtype, resolve_precision


@dataclass(frozen=True)
class Compiled:
    """One kernel that a run needed: compiled now, or warm, which is read from the cache on disk."""

    name: str
    seconds: float
    warm: bool


@contextmanager
def compilations() -> Iterator[list[Compiled]]:
    """Collect what Triton compiles, or reads from its cache on disk, inside.

    A kernel that this process has launched before, in the same form, is in its memory and not among them.

    Raises:
        RuntimeError: Triton is older than 3.4 and tells nobody what it compiles.
    """
    import triton

    knobs = getattr(triton, "knobs", None)
    if knobs is None:
        raise RuntimeError(f"Triton {triton.__version__} does not say what it compiles: 3.4 or newer is needed")
    found: list[Compiled] = []
    earlier = knobs.compilation.listener

    def listen(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        found.append(Compiled(src.name, times.total / 1e6, cache_hit))
        if earlier is not None:
            earlier(src=src, times=times, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = earlier


def warm_up(
    model: str,
    device: str,
    *,
    precision: str = "auto",
    img_size: int | None = None,
    batch_size: int = 8,
    train: bool = False,
    pretrained: str | None = None,
) -> dict[str, Any]:
    """Run a model forward once, or forward and backward, and say what was compiled for it.

    Args:
        model: name of a dual encoder or of an image tower.
        device: where it runs; kernels are compiled on a CUDA device alone.
        precision: a word of ``florence_fast.precision``.
        img_size: side of the images, S; None takes the model's.
        batch_size: B, images, and as many texts for a dual encoder.
        train: also the backward; of a dual encoder through the contrastive loss, of a tower through a sum.
        pretrained: weights; drawn ones compile the same kernels.

    Returns:
        "kernels": a row of name, seconds and warm for each; "first" and "second": seconds of two runs, of which only
        the first compiles.

    Raises:
        ValueError: the model or the precision is unknown.
        RuntimeError: as ``compilations`` says.
    """
    precision = resolve_precision(precision, device)
    size = {} if img_size is None else {"img_size": img_size}
    net = create_model(model, pretrained, precision, device, **size).train(train)
    with compilations() as found:
        first = _seconds(net, batch_size, precision, train)
    second = _seconds(net, batch_size, precision, train)
    kernels = [{"name": kernel.name, "seconds": kernel.seconds, "warm": kernel.warm} for kernel in found]
    return {"kernels": kernels, "first": first, "second": second}


def _seconds(net: nn.Module, batch_size: int, precision: str, train: bool) -> float:
    """Run once and wait for the device."""
    parameter = next(net.parameters())
    inputs = _inputs(net, batch_size)
    start = time.perf_counter()
    with torch.set_grad_enabled(train), autocast(precision, parameter.device):
        out = net(*inputs)
        if train:
            out = contrastive_loss(*out) if isinstance(net.config, FlorenceConfig) else out.float().sum()
    if train:
        out.backward()
        net.zero_grad(set_to_none=True)
    if parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)
    return time.perf_counter() - start


def _inputs(net: nn.Module, batch_size: int) -> tuple[Tensor, ...]:
    """Draw images (B, 3, S, S) and, for a dual encoder, (B, L) ids of which the last is the end of the text."""
    parameter = next(net.parameters())
    config = cast(ModelConfig, net.config)
    side = (config.image if isinstance(config, FlorenceConfig) else config).img_size
    images = torch.randn(batch_size, 3, side, side, device=parameter.device, dtype=input_dtype(net))
    if not isinstance(config, FlorenceConfig):
        return (images,)
    vocab_size, length = config.text.vocab_size, config.text.context_length
    tokens = torch.randint(1, vocab_size - 1, (batch_size, length), device=parameter.device)
    tokens[:, -1] = vocab_size - 1
    return images, tokens
