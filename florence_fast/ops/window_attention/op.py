"""Self-attention inside the windows of a map, straight from the output of the QKV linear.

Every block of CoSwin and Swin is built on it (Florence, arXiv 2111.11432, section 2.3; Swin, 2103.14030, section 3.2;
Swin V2's cosine attention, 2111.09883, section 3.2; in 3-D, Video Swin, 2106.13230).

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast import native
from florence_fast.errors import unknown
from florence_fast.ops import dispatch
from florence_fast.ops.checks import check_tensor, per_axis
from florence_fast.ops.spec import Op
from florence_fast.ops.windows import (
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
    backend = dispatch.choose("window_attention", qkv, rel_pos_bias_table, **options)
    qkv = dispatch.autocast_input(qkv)
    if backend == "reference":
        return window_attention_reference(qkv, rel_pos_bias_table, **options)
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    tensors = (qkv, rel_pos_bias_table, bias, logit_scale, qkv_bias)
    return _window_attention(*tensors, window, num_heads, shift, scale, pad_mode, wraps, backend)[0]


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
    sizes = (qkv.shape, window_size, num_heads, shift_size, cyclic)
    window, shift, wraps, offsets, tokens = (_check_sizes_once if _are_plain(*sizes) else _check_sizes)(*sizes)
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
    check_tensor("qkv", qkv)
    if rel_pos_bias_table is not None:
        check_tensor("rel_pos_bias_table", rel_pos_bias_table, (offsets, num_heads), beside=qkv, owner="qkv")
    if bias is not None:
        check_tensor("bias", bias, (num_heads, tokens, tokens), beside=qkv, owner="qkv")
    if logit_scale is not None:
        check_tensor("logit_scale", logit_scale, (num_heads,), (num_heads, 1, 1), beside=qkv, owner="qkv")
    if qkv_bias is not None:
        check_tensor("qkv_bias", qkv_bias, (qkv.shape[-1],), beside=qkv, owner="qkv")
    return list(window), list(shift), list(wraps)


def _check_sizes(
    shape: Sequence[int],
    window_size: int | Sequence[int],
    num_heads: int,
    shift_size: int | Sequence[int],
    cyclic: bool | Sequence[bool],
) -> tuple[Sequence[int], Sequence[int], Sequence[bool], int, int]:
    """Raise what is wrong with the sizes; return window, shift and cyclic per axis, the table's rows, and N."""
    if len(shape) not in (4, 5) or shape[-1] % (3 * num_heads) or shape[-1] == 0:
        raise ValueError(
            f"qkv must have shape (B, H, W, 3*C) or (B, T, H, W, 3*C) with C divisible by num_heads={num_heads}, "
            f"got {tuple(shape)}"
        )
    size = shape[1:-1]
    if any(side == 0 for side in size):
        raise ValueError(f"qkv must have a map of at least one token, got shape {tuple(shape)}")
    window = [int(w) for w in per_axis("window_size", window_size, len(size))]
    shift = [int(s) if isinstance(s, int) else s for s in per_axis("shift_size", shift_size, len(size))]
    wraps = [bool(c) for c in per_axis("cyclic", cyclic, len(size), bool)]
    if min(window) < 1:
        raise ValueError(f"window_size must be positive on every axis, got {window_size!r}")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"shift_size must be in [0, window_size) on every axis, got {shift_size!r} for {window_size!r}"
        )
    return window, shift, wraps, math.prod([2 * w - 1 for w in window]), math.prod(window)


_check_sizes_once = functools.lru_cache(maxsize=1024)(_check_sizes)
_INT, _BOOL = frozenset({int}), frozenset({bool})


def _are_plain(
    shape: Sequence[int],
    window_size: int | Sequence[int],
    num_heads: int,
    shift_size: int | Sequence[int],
    cyclic: bool | Sequence[bool],
) -> bool:
    """Say whether sizes that are equal to these are right if these are; nothing that is traced is plain."""
    if torch.compiler.is_dynamo_compiling() or type(num_heads) is not int or not _INT.issuperset(map(type, shape)):
        return False
    for value, kind in ((window_size, _INT), (shift_size, _INT), (cyclic, _BOOL)):
        if type(value) not in kind and not (type(value) is tuple and kind.issuperset(map(type, value))):
            return False
    return True


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
    full, shift, around = (
        tuple(x) if isinstance(x, Sequence) else (x,) * axes for x in (window_size, shift_size, cyclic)
    )
    cut = cut_map(qkv.shape[1:-1], full, shift)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with dispatch.without_autocast(qkv.device.type):
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
        blocked = blocked_pairs(cut, around, pad_mode == "mask", qkv.device)
        if blocked is not None:
            scores = scores.unflatten(0, (-1, cut.num_windows)).masked_fill(blocked[:, None], -math.inf).flatten(0, 1)
        out = scores.softmax(-1).to(dtype) @ v
        return crop(merge(out[None], cut, qkv.dtype), cut)


def _cpp_reasons(qkv: Tensor, rel_pos_bias_table: Tensor | None = None, **options: Any) -> list[str]:
    return native.reasons(qkv, rel_pos_bias_table, *map(options.get, ("bias", "logit_scale", "qkv_bias")))


def _triton_reasons(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None = None,
    *,
    window_size: int | Sequence[int],
    num_heads: int,
    scale: float | None = None,
    **_: Any,
) -> list[str]:
    # The window that is asked for is looked at, not the map: a compiled function must not depend on the map's size.
    reasons = dispatch.triton_reasons(qkv)
    sides = [window_size] * (qkv.ndim - 2) if isinstance(window_size, int) else window_size
    tokens = math.prod(sides)
    if tokens > MAX_TRITON_TOKENS:
        reasons.append(f"the kernels hold at most {MAX_TRITON_TOKENS} tokens a window, got {tokens}")
    if max(sides) > MAX_TRITON_SIDE:
        reasons.append(f"the kernels hold windows of at most {MAX_TRITON_SIDE} tokens on an axis, got {max(sides)}")
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if head_dim not in TRITON_HEAD_DIMS:
        reasons.append(f"the head dim must be one of {TRITON_HEAD_DIMS}, got {head_dim}")
    dtype = dispatch.autocast_dtype(qkv)
    if dtype not in dispatch.TRITON_DTYPES:
        reasons.append(f"qkv must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
    if scale is not None and not scale >= MIN_TRITON_SCALE:
        reasons.append(f"the kernels divide the bias by the scale, which must be at least {MIN_TRITON_SCALE}")
    return reasons


def _outputs(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
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


def _example(device: str) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    qkv = torch.randn(2, 14, 14, 3 * 64, device=device)
    table = torch.zeros(13 * 13, 2, device=device)
    return (qkv, table), {"window_size": 7, "num_heads": 2, "shift_size": 3}


_window_attention = Op(
    window_attention,
    window_attention_reference,
    example=_example,
    reasons={"triton": _triton_reasons, "cpp": _cpp_reasons},
    tensors=5,
    outputs=_outputs,
)
