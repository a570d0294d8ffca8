"""The ops on rows of channels: layer norm, normalisation to length 1, and the two-layer perceptron of a block.

Letters: R rows · C channels.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.verify.cases import Case, Function, Inputs, Subject, generator

Draw = Callable[..., Tensor]


def _inputs(
    make: Callable[[Draw], dict[str, Tensor]], out: tuple[int, ...], wide: set[str], outs: int = 1
) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)``; the tensors named in ``wide`` stay float32, as in a model's parameters."""

    def draw(dtype: torch.dtype, device: str, seed: int) -> Inputs:
        source, full = generator(device, seed), torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, device=device, dtype=full)

        tensors = {name: x if name in wide else x.to(dtype) for name, x in make(normal).items()}
        grads_out = tuple(normal(*out).to(dtype) for _ in range(outs))
        return Inputs(tensors, {}, grads_out if outs > 1 else grads_out[0])

    return draw


def draw_layer_norm(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for rows whose mean is not zero."""

    def make(normal: Draw) -> dict[str, Tensor]:
        return {"x": 1 + 2 * normal(rows, channels), "weight": 1 + normal(channels) / 4, "bias": normal(channels)}

    return _inputs(make, (rows, channels), {"weight", "bias"})


def draw_layer_norm_residual(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return the same for the form that adds a residual first and returns the sum and the norm."""

    def make(normal: Draw) -> dict[str, Tensor]:
        rows_of_both = {"x": normal(rows, channels), "residual": 1 + 2 * normal(rows, channels)}
        return rows_of_both | {"weight": 1 + normal(channels) / 4, "bias": normal(channels)}

    return _inputs(make, (rows, channels), {"weight", "bias"}, outs=2)


def draw_l2_normalize(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for rows of any length."""
    return _inputs(lambda normal: {"x": normal(rows, channels)}, (rows, channels), set())


def draw_mlp(rows: int, channels: int) -> Callable[..., Inputs]:
    """Return ``make(dtype, device, seed)`` for a perceptron that is four times as wide inside."""

    def make(normal: Draw) -> dict[str, Tensor]:
        wide = 4 * channels
        return {
            "x": normal(rows, channels),
            "weight1": normal(wide, channels) / channels**0.5,
            "bias1": normal(wide),
            "weight2": normal(channels, wide) / wide**0.5,
            "bias2": normal(channels),
        }

    return _inputs(make, (rows, channels), set())


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise in the dtype of ``x``."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))


def plain_layer_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add and normalise in the dtype of ``x``."""
    total = x + residual
    return total, plain_layer_norm(total, weight, bias)


def plain_l2_normalize(x: Tensor) -> Tensor:
    """Normalise in the dtype of ``x``."""
    return F.normalize(x, dim=-1)


def plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers with a GELU between them."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _subject(op: str, setup: Callable[[int, int], Callable[..., Inputs]], plain: Function) -> Subject:
    checked = tuple(Case(f"{rows}x{channels}", setup(rows, channels)) for rows, channels in ((64, 96), (37, 200)))
    timed = {"cpu": Case("6,272 rows, C=96", setup(6272, 96)), "cuda": Case("401,408 rows, C=96", setup(401408, 96))}
    return Subject(op=op, checked=checked, timed=timed, rivals={"eager": lambda inputs: functools.partial(plain)})


SUBJECTS = (
    _subject("layer_norm", draw_layer_norm, plain_layer_norm),
    _subject("l2_normalize", draw_l2_normalize, plain_l2_normalize),
    _subject("mlp", draw_mlp, plain_mlp),
)
