"""The ``torch`` backend of window attention: library calls only, forward and backward, on any device.

What it does beside the definition is to spare time on a CPU: one copy in, one copy out, the mask and the bias added
once, P kept for the backward. Everything is summed in an order that does not depend on threads.

Letters: B batch · C channels · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._windows import (
    MAX_LOG_SCALE,
    Cut,
    blocked_pairs,
    corner_index,
    crop,
    cut_map,
    is_pad,
    merge,
    offset_index,
    partition,
)


def window_attention_fwd(
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
) -> tuple[Tensor, Tensor]:
    """Return the result and, if ``train``, P: the probabilities (B*M, h, N, N) in the dtype of ``qkv``.

    P is kept because the softmax is the dearest step on a CPU: 7 of the 20 ms of a bf16 forward over 1,536 windows
    of 64 tokens, where a product takes 2 to 4. q, k and v are cut out of qkv again, which is a copy of 3 ms.
    """
    cut = cut_map(qkv.shape[1:-1], tuple(window_size), tuple(shift_size))
    dtype = _compute_dtype(qkv, cut, logit_scale)
    q, k, v = partition(qkv, cut, 3, num_heads, dtype, fill=qkv_bias)
    q, k = _scaled(q, k, scale, logit_scale)
    added = _added_to_scores(rel_pos_bias_table, bias, cut, tuple(window_size), tuple(cyclic), pad_mode, q)
    if not train and _prefers_sdpa(cut, dtype):
        out, probs = _sdpa(q, k, v, added), None
    else:
        probs = _probabilities(q, k, added)
        out = probs @ v
    out = crop(merge(out[None], cut, qkv.dtype), cut)
    return out, probs.to(qkv.dtype) if train else qkv.new_empty(0)


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    probs: Tensor,
    needs: list[bool],
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    scale: float,
    pad_mode: str,
    cyclic: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, table, bias, logit_scale and qkv_bias, None where ``needs`` is false."""
    needs_qkv, needs_table, needs_bias, needs_logit_scale, needs_qkv_bias = needs
    cut = cut_map(qkv.shape[1:-1], tuple(window_size), tuple(shift_size))
    dtype = _compute_dtype(qkv, cut, logit_scale)
    q, k, v = partition(qkv, cut, 3, num_heads, dtype, fill=qkv_bias)
    (d_out,) = partition(grad_out, cut, 1, num_heads, dtype)
    probs = probs.to(dtype)
    d_scores = torch._softmax_backward_data(d_out @ v.mT, probs, -1, dtype)

    d_table = d_bias = d_logit_scale = d_qkv_bias = None
    if needs_table or needs_bias:
        d_added = d_scores.sum(0, dtype=_sum_dtype(dtype))
        d_table = _fold_into_table(d_added, cut, tuple(window_size), rel_pos_bias_table) if needs_table else None
        d_bias = _fold_into_bias(d_added, cut, tuple(window_size), bias) if needs_bias else None
    if not (needs_qkv or needs_logit_scale or needs_qkv_bias):
        return None, d_table, d_bias, None, None

    q_scaled, k_scaled = _scaled(q, k, scale, logit_scale)
    d_parts = torch.empty(3, *q.shape, dtype=dtype, device=q.device)
    _product(d_scores, k_scaled, out=d_parts[0])
    _product(d_scores.mT, q_scaled, out=d_parts[1])
    _product(probs.mT, d_out, out=d_parts[2])
    if logit_scale is None:
        d_parts[0].mul_(scale)
    else:
        d_logit_scale = _through_cosine_(d_parts, q, k, logit_scale)
    d_map = merge(d_parts, cut, qkv.dtype)
    if needs_qkv_bias:
        pads = d_map.flatten(1, -2)[:, is_pad(cut, qkv.device)]
        d_qkv_bias = pads.sum((0, 1), dtype=_sum_dtype(dtype)).to(qkv_bias.dtype)
    return crop(d_map, cut) if needs_qkv else None, d_table, d_bias, d_logit_scale, d_qkv_bias


def _compute_dtype(qkv: Tensor, cut: Cut, logit_scale: Tensor | None) -> torch.dtype:
    """Choose the dtype of products and softmax; sums are in float32 or better everywhere.

    A cosine times 100 needs float32. On a CPU half precision is slower than float32 in rows of fewer than 32 (the
    softmax of 16 and its backward: 3.2 and 6.0 ms against 1.0 and 0.3), and fp16 is slower at any length.
    """
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return qkv.dtype
    slow_on_cpu = qkv.device.type == "cpu" and (cut.num_tokens < 32 or qkv.dtype == torch.float16)
    return torch.float32 if slow_on_cpu or logit_scale is not None else qkv.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _prefers_sdpa(cut: Cut, dtype: torch.dtype) -> bool:
    """Say whether SDPA's forward alone is faster than two products and a softmax, as measured on a CPU.

    At 49 tokens: bf16 4.9 against 3.7 ms, float32 4.5 against 5.6; at 144: 8.1 against 13.6 and 7.2 against 15.8.
    """
    return cut.num_tokens >= (32 if dtype == torch.float32 else 64)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x/|x| along d and 1/|x|, with the epsilon of torch.nn.functional.normalize."""
    inverse = 1 / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return x * inverse, inverse


def _factor(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the factor of the cosine, (h, 1, 1)."""
    return logit_scale.clamp(max=MAX_LOG_SCALE).exp().view(-1, 1, 1).to(dtype)


def _scaled(q: Tensor, k: Tensor, scale: float, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the two factors whose product is the scores, the scale being in the first."""
    if logit_scale is None:
        return q * scale, k
    return _normalised(q)[0] * _factor(logit_scale, q.dtype), _normalised(k)[0]


def _through_cosine_(d_parts: Tensor, q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Turn the gradients of the scaled q and k, in place, into those of q and k; return that of ``logit_scale``."""
    (q_hat, q_inverse), (k_hat, k_inverse) = _normalised(q), _normalised(k)
    factor = _factor(logit_scale, q.dtype)
    d_factor = (d_parts[0] * q_hat).sum((0, 2, 3))
    d_parts[0].mul_(factor)
    for d, x_hat, inverse in ((d_parts[0], q_hat, q_inverse), (d_parts[1], k_hat, k_inverse)):
        d.sub_(x_hat * (d * x_hat).sum(-1, keepdim=True)).mul_(inverse)
    # The clamp passes the gradient at its border, as torch.clamp does.
    d_log = torch.where(logit_scale.flatten() <= MAX_LOG_SCALE, d_factor * factor.flatten(), 0)
    return d_log.view_as(logit_scale).to(logit_scale.dtype)


def _added_to_scores(
    table: Tensor | None,
    bias: Tensor | None,
    cut: Cut,
    window_size: tuple[int, ...],
    cyclic: tuple[bool, ...],
    pad_mode: str,
    q: Tensor,
) -> Tensor | None:
    """Join bias and mask into one term: (1, h, N, N) where windows are alike, else (M, h or 1, N, N)."""
    added = None
    if table is not None:
        rows = table.index_select(0, offset_index(cut.window, window_size, q.device))
        added = rows.T.reshape(1, -1, cut.num_tokens, cut.num_tokens).to(q.dtype)
    elif bias is not None:
        corner = corner_index(cut.window, window_size, q.device)
        added = bias.index_select(1, corner).index_select(2, corner).to(q.dtype)[None]
    blocked = blocked_pairs(cut, cyclic, pad_mode == "mask", q.device)
    if blocked is None:
        return added
    mask = torch.zeros_like(blocked, dtype=q.dtype).masked_fill_(blocked, -math.inf)[:, None]
    return mask if added is None else added + mask


def _probabilities(q: Tensor, k: Tensor, added: Tensor | None) -> Tensor:
    scores = q @ k.mT
    if added is not None:
        scores.view(len(scores) // len(added), len(added), *scores.shape[1:]).add_(added)
    return scores.softmax(-1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """Attend by SDPA, the windows of a map beside its heads, so that one mask of a map serves the whole batch."""
    rows, num_heads, num_tokens, _ = q.shape
    windows = 1 if added is None else len(added)
    if added is not None:
        added = added.expand(windows, num_heads, -1, -1).reshape(1, windows * num_heads, num_tokens, num_tokens)
        added = added.expand(rows // windows, -1, -1, -1)
    q, k, v = (x.view(rows // windows, windows * num_heads, num_tokens, -1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, added, scale=1.0).reshape(rows, num_heads, num_tokens, -1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def _fold_into_table(d_added: Tensor, cut: Cut, window_size: tuple[int, ...], table: Tensor) -> Tensor:
    """Sum the gradient of the expanded bias (h, N, N) over the pairs of each offset.

    By the backward of an embedding, whose order of summation is fixed; that of ``table[index]`` is not.
    """
    index = offset_index(cut.window, window_size, table.device)
    d_rows = d_added.flatten(1).T.contiguous()
    d_table = torch.ops.aten.embedding_dense_backward(
        d_rows, index, len(table), padding_idx=-1, scale_grad_by_freq=False
    )
    return d_table.to(table.dtype)


def _fold_into_bias(d_added: Tensor, cut: Cut, window_size: tuple[int, ...], bias: Tensor) -> Tensor:
    """Put the gradient of the corner that was read into that of the whole bias."""
    corner = corner_index(cut.window, window_size, bias.device)
    d_bias = torch.zeros_like(bias)
    d_bias[:, corner[:, None], corner] = d_added.to(bias.dtype)
    return d_bias
