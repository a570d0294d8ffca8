"""The ``torch`` backend of window attention: library calls only, forward and backward, on any device.

What it does beside the definition is to spare time on a CPU: one copy in, one copy out, the mask and the bias added
once, P kept for the backward. Everything is summed in an order that does not depend on threads.

Letters: B batch · C channels · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._product import widens
from florence_fast.ops.windows import (
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

SLICE_BYTES = 4 << 20
"""How many bytes of scores a CPU works on at a time."""


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
    added = _added_to_scores(rel_pos_bias_table, bias, cut, tuple(window_size), cyclic, pad_mode, qkv.device, dtype)
    shape = (len(qkv) * cut.num_windows, num_heads, cut.num_tokens, cut.num_tokens) if train else (0,)
    kept = qkv.new_empty(shape)
    outs = []
    for images, windows in _slices(qkv, cut, num_heads, dtype):
        q, k, v = partition(qkv[images], cut, 3, num_heads, dtype, fill=qkv_bias)
        q, k = _scaled(q, k, scale, logit_scale)
        if train:
            out = _probabilities(q, k, added, kept[windows]) @ v
        elif _prefers_sdpa(cut, dtype):
            out = _sdpa(q, k, v, added)
        else:
            out = _probabilities(q, k, added) @ v
        outs.append(crop(merge(out[None], cut, qkv.dtype), cut))
    return _join(outs), kept


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
    wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": qkv.device}
    d_added = torch.zeros(num_heads, cut.num_tokens, cut.num_tokens, **wide)
    d_log, d_fill, d_qkvs = torch.zeros(num_heads, **wide), torch.zeros(qkv.shape[-1], **wide), []
    for images, windows in _slices(qkv, cut, num_heads, dtype):
        q, k, v = partition(qkv[images], cut, 3, num_heads, dtype, fill=qkv_bias)
        (d_out,) = partition(grad_out[images], cut, 1, num_heads, dtype)
        p = probs[windows].to(dtype)
        d_scores = torch._softmax_backward_data(d_out @ v.mT, p, -1, dtype)  # pyright: ignore[reportPrivateImportUsage]
        if needs_table or needs_bias:
            d_added += _sum_windows(d_scores)
        if needs_qkv or needs_logit_scale or needs_qkv_bias:
            d_parts = _through_products(d_scores, p, d_out, *_scaled(q, k, scale, logit_scale))
            if logit_scale is None:
                d_parts[0].mul_(scale)
            else:
                d_log += _through_cosine_(d_parts, q, k, logit_scale)
            d_map = merge(d_parts, cut, qkv.dtype)
            d_qkvs.append(crop(d_map, cut))
            if needs_qkv_bias:
                d_fill += torch.where(is_pad(cut, qkv.device), d_map, 0).flatten(0, -2).sum(0, dtype=wide["dtype"])
    window = tuple(window_size)
    return (
        _join(d_qkvs) if needs_qkv else None,
        _fold_into_table(d_added, cut, window, rel_pos_bias_table)
        if needs_table and rel_pos_bias_table is not None
        else None,
        _fold_into_bias(d_added, cut, window, bias) if needs_bias and bias is not None else None,
        d_log.view_as(logit_scale).to(logit_scale.dtype) if needs_logit_scale and logit_scale is not None else None,
        d_fill.to(qkv_bias.dtype) if needs_qkv_bias and qkv_bias is not None else None,
    )


def _slices(qkv: Tensor, cut: Cut, num_heads: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Walk over the batch: which images, and which of its windows, to work on at a time.

    On a CPU the scores of one slice stay near the caches and below the size from which every allocation is fetched
    from the system anew; the order of the sums over slices is fixed.
    """
    batch = len(qkv)
    step = max(batch, 1)
    if qkv.device.type == "cpu":
        bytes_per_image = cut.num_windows * num_heads * cut.num_tokens**2 * dtype.itemsize
        step = max(1, SLICE_BYTES // bytes_per_image)
    for start in range(0, max(batch, 1), step):
        stop = min(start + step, batch)
        yield slice(start, stop), slice(start * cut.num_windows, stop * cut.num_windows)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _compute_dtype(qkv: Tensor, cut: Cut, logit_scale: Tensor | None) -> torch.dtype:
    """Choose the dtype of products and softmax; sums are in float32 or better everywhere.

    A cosine times 100 needs float32. On a CPU bf16 is slower than float32 in rows of 12 to 31 (the softmax of 16 and
    its backward: 3.2 and 6.0 ms against 1.0 and 0.3) and of 1, and fp16 is slower at any length.
    """
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return qkv.dtype
    slow_on_cpu = widens(qkv) or (
        qkv.device.type == "cpu" and (12 <= cut.num_tokens < 32 or cut.num_tokens == 1 or qkv.dtype == torch.float16)
    )
    return torch.float32 if slow_on_cpu or logit_scale is not None else qkv.dtype


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


def _through_products(d_scores: Tensor, p: Tensor, d_out: Tensor, q_scaled: Tensor, k_scaled: Tensor) -> Tensor:
    """Give the gradients of the scaled q and k and of v, (3, B*M, h, N, d), each product into its place."""
    d_parts = torch.empty(3, *d_out.shape, dtype=d_out.dtype, device=d_out.device)
    for place, a, b in zip(d_parts, (d_scores, d_scores.mT, p.mT), (k_scaled, q_scaled, d_out), strict=True):
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=place.flatten(0, 1))
    return d_parts


def _through_cosine_(d_parts: Tensor, q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Turn the gradients of the scaled q and k, in place, into those of q and k; return that of ``logit_scale``."""
    (q_hat, q_inverse), (k_hat, k_inverse) = _normalised(q), _normalised(k)
    factor = _factor(logit_scale, q.dtype)
    d_factor = (d_parts[0] * q_hat).sum((0, 2, 3))
    d_parts[0].mul_(factor)
    for d, x_hat, inverse in ((d_parts[0], q_hat, q_inverse), (d_parts[1], k_hat, k_inverse)):
        d.sub_(x_hat * (d * x_hat).sum(-1, keepdim=True)).mul_(inverse)
    # The clamp passes the gradient at its border, as torch.clamp does.
    return torch.where(logit_scale.flatten() <= MAX_LOG_SCALE, d_factor * factor.flatten(), 0)


def _added_to_scores(
    table: Tensor | None,
    bias: Tensor | None,
    cut: Cut,
    window_size: tuple[int, ...],
    cyclic: list[bool],
    pad_mode: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """Join bias and mask into one term: (1, h, N, N) where windows are alike, else (M, h or 1, N, N)."""
    added = None
    if table is not None:
        rows = table.index_select(0, offset_index(cut.window, window_size, device))
        added = rows.to(dtype).T.contiguous().view(1, -1, cut.num_tokens, cut.num_tokens)
    elif bias is not None:
        corner = corner_index(cut.window, window_size, device)
        added = bias.index_select(1, corner).index_select(2, corner).to(dtype)[None]
    blocked = blocked_pairs(cut, cyclic, pad_mode == "mask", device)
    if blocked is None:
        return added
    mask = torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, -math.inf)[:, None]
    return mask if added is None else added + mask


def _probabilities(q: Tensor, k: Tensor, added: Tensor | None, kept: Tensor | None = None) -> Tensor:
    """Give softmax(q k^T + added), written into ``kept`` as well where that is given."""
    scores = q @ k.mT
    if added is not None:
        scores.view(len(scores) // len(added), len(added), *scores.shape[1:]).add_(added)
    if kept is not None and kept.dtype == scores.dtype:
        return torch.softmax(scores, -1, out=kept)
    probs = scores.softmax(-1)
    if kept is not None:
        kept.copy_(probs)
    return probs


def _sdpa(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    """Attend by SDPA, the windows of a map beside its heads, so that one mask of a map serves the whole batch."""
    rows, num_heads, num_tokens, head_dim = q.shape
    windows = 1 if added is None else len(added)
    maps = rows // windows
    if added is not None:
        added = added.expand(windows, num_heads, -1, -1).reshape(1, windows * num_heads, num_tokens, num_tokens)
        added = added.expand(maps, -1, -1, -1)
    q, k, v = (x.reshape(maps, windows * num_heads, num_tokens, head_dim) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, added, scale=1.0).reshape(rows, num_heads, num_tokens, head_dim)


def _sum_windows(x: Tensor) -> Tensor:
    """Sum over the windows, accumulating in float32 or better; (B*M, h, N, N) to (h, N, N).

    On a CPU a sum of bf16 accumulates in float32 by itself, and ``dtype=`` would first write a float32 copy.
    """
    return x.sum(0) if x.device.type == "cpu" else x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


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
