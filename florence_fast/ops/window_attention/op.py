"""Self-attention inside the windows of a map, straight from the output of the QKV linear.

Every block of CoSwin and Swin is built on it (Florence, arXiv 2111.11432, section 2.3; Swin, 2103.14030, section 3.2;
Swin V2's cosine attention, 2111.09883, section 3.2; in 3-D, Video Swin, 2106.13230).

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast import native
from florence_fast.errors import unknown
from florence_fast.ops import _backend, _op
from florence_fast.ops._windows import (
    MAX_LOG_SCALE,
    blocked_pairs,
    corner_index,
    crop,
    cut_map,
    keeps_log_sum_exp,
    merge,
    offset_index,
    partition,
    window_and_grid,
)
from florence_fast.ops.window_attention import cpp
from florence_fast.ops.window_attention import torch as torch_backend

PAD_MODES = ("mask", "bias")

TRITON_HEAD_DIMS = (16, 32, 64, 128)
MAX_TRITON_TOKENS = 784
MAX_TRITON_SIDE = 144
MIN_TRITON_SCALE = 2.0**-10


def window_attention(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    num_heads: int,
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    pad_mode: str = "mask",
    qkv_bias: Tensor | None = None,
    cyclic: bool | Sequence[bool] = False,
) -> Tensor:
    """Attend within the (shifted) windows of a map.

    ``softmax(scale * q k^T + B) v`` for each window and head, B being the relative position bias (Swin, equation 4);
    with ``logit_scale`` ``softmax(exp(min(logit_scale, log 100)) * cos(q, k) + B) v`` (Swin V2, equation 2). Shift,
    windows and mask are index arithmetic: the map is neither rolled nor partitioned by the caller.

    Args:
        qkv: (B, H, W, 3*C) or (B, T, H, W, 3*C), floating; the channels are ordered (3, h, d).
        rel_pos_bias_table: (prod(2*window_size-1), h), usually float32, which autocast does not change.
        window_size: tokens per axis.
        num_heads: h.
        shift_size: tokens per axis by which the map is rolled towards its start, 0 <= shift < window.
        scale: factor of q k^T, d**-0.5 by default.
        bias: (h, N, N) in place of a table, N = prod(window_size).
        logit_scale: h values, the logarithm of the factor of the cosine.
        pad_mode: what completes the last window of a map that the windows do not divide. "mask": nothing, the pads
            are seen by no token. "bias": tokens whose q, k, v are ``qkv_bias``, as in Swin models that pad before
            the QKV linear.
        qkv_bias: (3*C,), the bias of the QKV linear (``qkv`` holds it already); for pad_mode="bias" alone.
        cyclic: per axis, whether the map is a ring there: windows that a shift lays over the seam are then not cut.

    Returns:
        (B, H, W, C) or (B, T, H, W, C) in the dtype of ``qkv``; under autocast in autocast's,
        unless it is float64.

    Raises:
        TypeError: an argument is no tensor, or a tensor is not floating.
        ValueError: a shape, a size or a combination of arguments is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    An axis no longer than the window is one window: no shift, no pads, and the bias is read by relative offset at the
    table's centre (of ``bias`` the leading corner). Pads stand between the two ends of a cyclic axis. An empty batch
    gives an empty result. Second derivatives are the reference's.

    >>> qkv, table = torch.randn(2, 14, 14, 3 * 96), torch.zeros(13 * 13, 3)
    >>> window_attention(qkv, table, window_size=7, num_heads=3, shift_size=3).shape
    torch.Size([2, 14, 14, 96])
    """
    options = {
        "window_size": window_size,
        "num_heads": num_heads,
        "shift_size": shift_size,
        "scale": scale,
        "bias": bias,
        "logit_scale": logit_scale,
        "pad_mode": pad_mode,
        "qkv_bias": qkv_bias,
        "cyclic": cyclic,
    }
    window, shift, wraps = _check_window_attention(qkv, rel_pos_bias_table, **options)
    backend = _backend.choose("window_attention", qkv, rel_pos_bias_table, **options)
    qkv = _backend.autocast_input(qkv)
    if backend == "reference":
        return window_attention_reference(qkv, rel_pos_bias_table, **options)
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    tensors = (qkv, rel_pos_bias_table, bias, logit_scale, qkv_bias)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _window_attention(*tensors, window, num_heads, shift, scale, pad_mode, wraps, train, backend)[0]


def _check_window_attention(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    *,
    window_size: int | Sequence[int],
    num_heads: int,
    shift_size: int | Sequence[int],
    scale: float | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_mode: str,
    qkv_bias: Tensor | None,
    cyclic: bool | Sequence[bool],
) -> tuple[list[int], list[int], list[bool]]:
    """Raise what is wrong with the arguments; return window, shift and cyclic per axis."""
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive int, got {num_heads!r}")
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor, got {type(qkv).__name__}")
    if qkv.ndim not in (4, 5) or qkv.shape[-1] % (3 * num_heads) or qkv.shape[-1] == 0:
        raise ValueError(
            f"qkv must have shape (B, H, W, 3*C) or (B, T, H, W, 3*C) with C divisible by num_heads={num_heads}, "
            f"got {tuple(qkv.shape)}"
        )
    size, channels = qkv.shape[1:-1], qkv.shape[-1]
    if any(side == 0 for side in size):
        raise ValueError(f"qkv must have a map of at least one token, got shape {tuple(qkv.shape)}")
    window = [int(w) for w in _per_axis("window_size", window_size, len(size), int)]
    shift = [int(s) if isinstance(s, int) else s for s in _per_axis("shift_size", shift_size, len(size), int)]
    wraps = [bool(c) for c in _per_axis("cyclic", cyclic, len(size), bool)]
    if min(window) < 1:
        raise ValueError(f"window_size must be positive on every axis, got {window_size!r}")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"shift_size must be in [0, window_size) on every axis, got {shift_size!r} for {window_size!r}"
        )
    if pad_mode not in PAD_MODES:
        raise unknown("pad_mode", pad_mode, PAD_MODES)
    if rel_pos_bias_table is not None and bias is not None:
        raise ValueError("rel_pos_bias_table and bias cannot both be given: at most one of them is added")
    if scale is not None and logit_scale is not None:
        raise ValueError("scale and logit_scale cannot both be given: cosine attention has no other scale")
    if pad_mode == "bias" and qkv_bias is None:
        raise ValueError("pad_mode='bias' fills the pads with qkv_bias, which must be given")
    if pad_mode == "mask" and qkv_bias is not None:
        raise ValueError("qkv_bias only fills the pads of pad_mode='bias', got it with pad_mode='mask'")
    tokens = math.prod(window)
    offsets = math.prod([2 * w - 1 for w in window])
    _check_tensor("qkv", qkv, None, qkv.device)
    _check_tensor("rel_pos_bias_table", rel_pos_bias_table, [(offsets, num_heads)], qkv.device)
    _check_tensor("bias", bias, [(num_heads, tokens, tokens)], qkv.device)
    _check_tensor("logit_scale", logit_scale, [(num_heads,), (num_heads, 1, 1)], qkv.device)
    _check_tensor("qkv_bias", qkv_bias, [(channels,)], qkv.device)
    return window, shift, wraps


def _per_axis(name: str, value: Any, axes: int, kind: type) -> Sequence[Any]:
    kinds = (kind, torch.SymInt) if torch.compiler.is_exporting() else kind
    values = [value] * axes if isinstance(value, kinds) else value
    if not isinstance(values, Sequence) or len(values) != axes or not all(isinstance(v, kinds) for v in values):
        raise ValueError(
            f"{name} must be one {kind.__name__} or {axes} of them, one per axis of the map, got {value!r}"
        )
    return values


def _check_tensor(name: str, x: Tensor | None, shapes: list[tuple[int, ...]] | None, device: torch.device) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if shapes and tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of qkv, {device}, got {x.device}")


def window_attention_reference(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    num_heads: int,
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    pad_mode: str = "mask",
    qkv_bias: Tensor | None = None,
    cyclic: bool | Sequence[bool] = False,
) -> Tensor:
    """Define ``window_attention`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    axes = qkv.ndim - 2
    full, shift, cyclic = (
        tuple(x) if isinstance(x, Sequence) else (x,) * axes for x in (window_size, shift_size, cyclic)
    )
    cut = cut_map(qkv.shape[1:-1], full, shift)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with _backend.without_autocast(qkv.device.type):
        q, k, v = partition(qkv, cut, 3, num_heads, dtype, fill=qkv_bias)
        if logit_scale is None:
            scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        else:
            tau = logit_scale.clamp(max=MAX_LOG_SCALE).exp().view(num_heads, 1, 1)
            scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * tau
        if rel_pos_bias_table is not None:
            index = offset_index(cut.window, full, qkv.device)
            rows = rel_pos_bias_table.index_select(0, index)
            bias = rows.view(cut.num_tokens, cut.num_tokens, num_heads).permute(2, 0, 1)
        elif bias is not None:
            corner = corner_index(cut.window, full, qkv.device)
            bias = bias.index_select(1, corner).index_select(2, corner)
        if bias is not None:
            scores = scores + bias
        blocked = blocked_pairs(cut, cyclic, pad_mode == "mask", qkv.device)
        if blocked is not None:
            scores = scores.unflatten(0, (-1, cut.num_windows)).masked_fill(blocked[:, None], -math.inf).flatten(0, 1)
        out = scores.softmax(-1).to(dtype) @ v
        return crop(merge(out[None], cut, qkv.dtype), cut)


def unsupported_reasons(
    backend: str, qkv: Tensor, rel_pos_bias_table: Tensor | None = None, **options: Any
) -> list[str]:
    """Say why ``backend`` cannot run ``window_attention`` on these arguments; an empty list means that it can."""
    if backend == "triton":
        return _triton_reasons(qkv, **options)
    if backend == "cpp":
        return native.reasons(qkv, rel_pos_bias_table, *map(options.get, ("bias", "logit_scale", "qkv_bias")))
    return []


def _triton_reasons(
    qkv: Tensor,
    *,
    window_size: int | Sequence[int],
    num_heads: int,
    scale: float | None = None,
    **_: Any,
) -> list[str]:
    # The window that is asked for is looked at, not the map: a compiled function must not depend on the map's size.
    reasons = _backend.triton_reasons(qkv)
    sides = [window_size] * (qkv.ndim - 2) if isinstance(window_size, int) else window_size
    tokens = math.prod(sides)
    if tokens > MAX_TRITON_TOKENS:
        reasons.append(f"the kernels hold at most {MAX_TRITON_TOKENS} tokens a window, got {tokens}")
    if max(sides) > MAX_TRITON_SIDE:
        reasons.append(f"the kernels hold windows of at most {MAX_TRITON_SIDE} tokens on an axis, got {max(sides)}")
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if head_dim not in TRITON_HEAD_DIMS:
        reasons.append(f"the head dim must be one of {TRITON_HEAD_DIMS}, got {head_dim}")
    dtype = _backend.autocast_dtype(qkv)
    if dtype not in _backend.TRITON_DTYPES:
        reasons.append(f"qkv must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and _backend.interpreting():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
    if scale is not None and not scale >= MIN_TRITON_SCALE:
        reasons.append(f"the kernels divide the bias by the scale, which must be at least {MIN_TRITON_SCALE}")
    return reasons


def _arguments(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    scale: float,
    pad_mode: str,
    cyclic: list[bool],
    train: bool,
) -> tuple[tuple[Tensor, Tensor | None], dict[str, Any]]:
    options = {"window_size": window_size, "num_heads": num_heads, "shift_size": shift_size, "scale": scale}
    options |= {"bias": bias, "logit_scale": logit_scale, "pad_mode": pad_mode, "qkv_bias": qkv_bias, "cyclic": cyclic}
    return (qkv, rel_pos_bias_table), options


def _forward(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    scale: float,
    pad_mode: str,
    cyclic: list[bool],
    train: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (qkv, rel_pos_bias_table, bias, logit_scale, qkv_bias)
    values = (window_size, num_heads, shift_size, scale, pad_mode, cyclic)
    return _implementation(backend).window_attention_fwd(*tensors, *values, train)


def _forward_fake(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    window_size, num_heads, *_, train, backend = args[4:]
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    window, grid = window_and_grid(qkv.shape[1:-1], tuple(window_size))
    rows = (qkv.shape[0] * math.prod(grid), num_heads, math.prod(window))
    if backend == "cpp":
        return out, qkv.new_empty(0)
    if backend == "triton":
        in_3d, by_cosines = len(window_size) == 3 and window_size[0] > 1, args[2] is not None
        keeps = train and (in_3d or by_cosines or keeps_log_sum_exp(window_size))
        return out, qkv.new_empty(rows if keeps else 0, dtype=torch.float32)
    return out, qkv.new_empty((*rows, rows[-1]) if train else 0)


def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    kept: Tensor,
    needs: list[bool],
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    scale: float,
    pad_mode: str,
    cyclic: list[bool],
    train: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (qkv, rel_pos_bias_table, bias, logit_scale, qkv_bias)
    values = (window_size, num_heads, shift_size, scale, pad_mode, cyclic)
    grads = _implementation(backend).window_attention_bwd(grad_out, *tensors, kept, needs, *values)
    return tuple(qkv.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, needs = args[:5], args[6]
    return tuple(
        x.new_empty(x.shape) if need else grad_out.new_empty(0) for x, need in zip(tensors, needs, strict=True)
    )


def _example(device: str) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    qkv = torch.randn(2, 14, 14, 3 * 64, device=device)
    table = torch.zeros(13 * 13, 2, device=device)
    return (qkv, table), {"window_size": 7, "num_heads": 2, "shift_size": 3}


def _implementation(backend: str) -> ModuleType:
    """Return the module of a backend; that of the kernels needs triton, so it is imported where it is used."""
    if backend == "triton":
        from florence_fast.ops.window_attention import triton

        return triton
    if backend == "cpp":
        return cpp
    return torch_backend


_window_attention = _op.define("window_attention", 5, _forward, _forward_fake, _backward, _backward_fake, _arguments)
_backend.register_entry(
    _backend.OpEntry("window_attention", window_attention, window_attention_reference, unsupported_reasons, _example)
)
