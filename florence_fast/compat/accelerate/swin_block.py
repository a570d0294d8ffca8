"""Shared by the blocks of timm, torchvision, MONAI and Microsoft's Swin, on `florence_fast.ops`.

All are built alike: norm, window attention, projection, sum, norm, MLP, sum. They differ in where their parts are kept
and in what they do at the rim of a map; each library's file says that. A part that is no longer PyTorch's own (LoRA,
quantised, hooked) is called as the module that it is.

B batch · C channels · h heads · N tokens in one window; a map has two or three axes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.compat.accelerate import merges, pieces
from florence_fast.compat.accelerate.options import Options
from florence_fast.models import layers

_MLPS = {"Mlp", "MLP", "MLPBlock"}
_NO_OPS = (nn.Dropout, nn.Identity)


def other_methods(module: nn.Module, known: type, *names: str) -> str | None:
    """Say which methods a subclass has changed, or an instance; None if they are those of the ``known`` class."""
    for name in names:
        if getattr(type(module), name, None) is not getattr(known, name, None):
            return f"{type(module).__name__} has a {name} of its own"
        if name != "forward" and name in vars(module):
            return f"its {name} is already replaced by something else"
    return None


def untouched(*modules: nn.Module) -> bool:
    """Return whether these modules, whose types the caller knows, may be passed over: nothing hangs on them."""
    return layers.is_plain(*modules, kinds=tuple({type(module) for module in modules}))


def is_traced(x: Any) -> bool:
    """Return whether a tracer records the call, whose result must hold no op of ours."""
    return torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def attend(
    x: Tensor,
    qkv: nn.Module | tuple[Tensor, Tensor | None],
    table: Tensor | None,
    *,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    rolls_first: bool = False,
    **options: Any,
) -> Tensor:
    """Map (B, *size, C) to (B, *size, C): q, k, v, attention in windows; the projection is the caller's.

    Where windows stick out of the map they hold tokens of zeros, which become the bias of q, k, v.

    Args:
        x: the normed map.
        qkv: the linear, or its weight and bias.
        table: as of `ops.window_attention`, which the ``options`` are for as well.
        window: tokens per axis. Unlike the op's, a window larger than the map is filled up.
        shift: tokens per axis, 0 where the padded axis is one window.
        num_heads: h.
        rolls_first: roll the map and then complete it, so that the pads lie at the end of the rolled map. The usual
            order is the other one, which is the op's as well.
    """
    size = x.shape[1:-1]
    missing = [-side % w for side, w in zip(size, window, strict=True)]
    is_module = isinstance(qkv, nn.Module)
    weight, bias = (None, None) if is_module and not layers.is_plain(qkv) else _weights(qkv)
    dims, by = tuple(range(1, x.ndim - 1)), tuple(shift)
    back = tuple(-s for s in by)
    rolled = rolls_first and any(missing) and any(by)
    padded = rolled or (any(missing) and weight is None) or any(s < w for s, w in zip(size, window, strict=True))
    if rolled:
        x = x.roll(back, dims)
    if padded:
        x = F.pad(x, (0, 0, *(pad for side in reversed(missing) for pad in (0, side))))
    if rolled:  # the op rolls it once more
        x = x.roll(by, dims)
    y = qkv(x) if weight is None else ops.linear(x, weight, bias)
    if weight is not None:
        options |= {"pad_mode": "bias", "qkv_bias": y.new_zeros(y.shape[-1]) if bias is None else bias}
    out = ops.window_attention(y, table, window_size=list(window), num_heads=num_heads, shift_size=list(by), **options)
    if rolled:
        out = out.roll(back, dims)
    if padded:
        out = out[(slice(None), *map(slice, size))]
    return out.roll(by, dims) if rolled else out.contiguous()


def _weights(qkv: nn.Module | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return (qkv.weight, qkv.bias) if isinstance(qkv, nn.Module) else qkv


def one_window_is_shifted(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Return whether an axis is shifted that holds a single window: there the op drops the shift."""
    return any(s > 0 and side <= w for side, w, s in zip(size, window, shift, strict=True))


def drops_attention(dropout: float, training: bool, where: str) -> bool:
    """Return whether weights of attention are dropped, which the kernels cannot; warn of it once."""
    if not training or dropout == 0:
        return False
    if not torch.compiler.is_compiling():
        pieces.warn_of_dropout(f"{where}={dropout}")
    return True


def add_and_norm(
    x: Tensor, branch: Tensor, drop_path: nn.Module, module: nn.Module, options: Options
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + drop_path(branch)`` and ``module(s)``, in one pass where it is asked for and possible."""
    if type(drop_path).__name__ != "StochasticDepth":
        return pieces.add_and_norm(x, branch, drop_path, module, options)
    if not options.norm or type(module) is not nn.LayerNorm or not untouched(drop_path, module):
        x = x + drop_path(branch)
        return x, pieces.norm(module, x, options)
    factors = None
    if drop_path.training and drop_path.p > 0:
        # Their own draw, of ones, is the factor of each sample: the same numbers from the same generator.
        factors = drop_path(branch.new_ones(len(branch), *[1] * (branch.ndim - 1))).flatten()
    return ops.layer_norm(branch, module.weight, module.bias, eps=module.eps, residual=x, residual_scale=factors)


def mlp(module: nn.Module, x: Tensor, options: Options) -> Tensor:
    """Return ``module(x)``, by our op if it is asked for and the module is two linears around a GELU."""
    parts = _mlp_parts(module) if options.mlp else None
    if parts is None:
        return module(x)
    first, activation, second = parts
    return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, activation=activation)


def _mlp_parts(module: nn.Module) -> tuple[nn.Linear, str, nn.Linear] | None:
    """Find linear, activation, linear; None if there is anything more, hooks on any of it, or dropout to be done."""
    if type(module).__name__ not in _MLPS:
        return None
    children = list(module.children())
    linears = [child for child in children if type(child) is nn.Linear]
    activations = [name for name in map(_activation, children) if name is not None]
    others = [child for child in children if type(child) in _NO_OPS]
    if len(linears) != 2 or len(activations) != 1 or len(others) != len(children) - 3:
        return None
    if any(isinstance(child, nn.Dropout) and child.training and child.p > 0 for child in others):
        return None
    return (linears[0], activations[0], linears[1]) if untouched(module, *children) else None


def _activation(module: nn.Module) -> str | None:
    """Name the GELU that a module is, as `ops.mlp` calls it."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    is_timm = type(module).__module__ == "timm.layers.activations"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh"}.get(type(module).__name__) if is_timm else None


def merging_reason(module: nn.Module, known: type, options: Options, library: str) -> str | None:
    """Say why a merge of the ``known`` class must keep its own forward; None if ours can stand in for it."""
    unasked = pieces.switched_off(options, "merging")
    try:
        return unasked or other_methods(module, known, "forward") or next(merges.reasons(module), None)
    except AttributeError as error:
        return missing_part(error, library)


def missing_part(error: AttributeError, library: str) -> str:
    """Word the reason of a layer whose parts are elsewhere."""
    return f"a version of {library} with other parts: {error}"


def table_reason(table: Tensor, window: Sequence[int], num_heads: int) -> str | None:
    """Say what is wrong with a bias table; None if it is as the op wants it."""
    rows = math.prod(2 * side - 1 for side in window)
    if tuple(table.shape) == (rows, num_heads):
        return None
    return f"the bias table must have shape {(rows, num_heads)}, got {tuple(table.shape)}"


def shrunken(
    size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int], attn: nn.Module
) -> tuple[list[int], list[int], Tensor | None]:
    """Give window, shift and, where it is not that of the table, bias (h, N, N) of windows that shrink to the map.

    Video Swin and its heirs read the bias of a smaller window from the leading rows and columns of the index of the
    full one. These are the offsets of the smaller window if only the first axis has shrunk; else they are others, on
    which such models have been trained.
    """
    short = [side <= w for side, w in zip(size, window_size, strict=True)]
    window = [side if is_short else w for side, w, is_short in zip(size, window_size, short, strict=True)]
    shift = [0 if is_short else by for by, is_short in zip(shift_size, short, strict=True)]
    if window == list(window_size):
        return window, shift, None
    tokens = math.prod(window)
    index = attn.relative_position_index[:tokens, :tokens]
    return window, shift, attn.relative_position_bias_table[index].permute(2, 0, 1)
