"""The ``torch`` backend of attention in windows that are cut out already: library calls only, on any device.

The probabilities are kept for the backward: to compute them again is dearer than to read them.

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._product import widened, widens


def window_attention_partitioned_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, train: bool
) -> tuple[Tensor, Tensor]:
    """Return the result and, if ``train``, the probabilities (B*M, h, N, N) in the dtype of q."""
    if widens(q):
        dtype = q.dtype
        q, k, v = widened(q, k, v)
        out, probs = window_attention_partitioned_fwd(q, k, v, bias, mask, scale, train)
        return out.to(dtype), probs.to(dtype)
    q, k, v = (x.contiguous() for x in (q, k, v))
    added = _added_to_scores(bias, mask, q.dtype)
    if not train:
        return _sdpa(q, k, v, added, scale), q.new_empty(0)
    scores = q * scale @ k.mT
    if added is not None:
        scores.view(len(scores) // len(added), len(added), *scores.shape[1:]).add_(added)
    probs = scores.softmax(-1)
    return probs @ v, probs


def window_attention_partitioned_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    probs: Tensor,
    needs: list[bool],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, bias and mask, None where ``needs`` is false."""
    if widens(q):
        g, wide_q, wide_k, wide_v = widened(grad_out, q, k, v)
        kept = probs.float()
        grads = window_attention_partitioned_bwd(g, wide_q, wide_k, wide_v, bias, mask, kept, needs, scale)
        return *(None if grad is None else grad.to(q.dtype) for grad in grads[:3]), *grads[3:]
    needs_q, needs_k, needs_v, needs_bias, needs_mask = needs
    d_scores = torch._softmax_backward_data(grad_out @ v.mT, probs, -1, probs.dtype)  # pyright: ignore[reportPrivateImportUsage]
    d_mask = None
    if needs_mask and mask is not None:
        d_mask = _sum(d_scores.unflatten(0, (len(q) // len(mask), len(mask))), (0, 2)).to(mask.dtype)
    return (
        (d_scores @ k).mul_(scale) if needs_q else None,
        (d_scores.mT @ q).mul_(scale) if needs_k else None,
        probs.mT @ grad_out if needs_v else None,
        _sum(d_scores, (0,)).to(bias.dtype) if needs_bias and bias is not None else None,
        d_mask,
    )


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum in float32 or better."""
    return x.sum(dims, dtype=torch.promote_types(x.dtype, torch.float32))


def _added_to_scores(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Join bias and mask into one term: (1, h, N, N), or (M, h or 1, N, N)."""
    if mask is None:
        return None if bias is None else bias.to(dtype)[None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    # Added before they are rounded: a mask of -100 in 16 bits would take the bias's last digits with it.
    return mask.to(dtype)[:, None] if bias is None else (bias + mask[:, None]).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Attend by SDPA, the windows of a map beside its heads, so that one mask of a map serves the whole batch."""
    windows, num_heads, tokens, head_dim = q.shape
    per_map = 1 if added is None else len(added)
    maps = windows // per_map
    if added is not None:
        added = added.expand(per_map, num_heads, -1, -1).reshape(1, per_map * num_heads, tokens, tokens)
        added = added.expand(maps, -1, -1, -1)
    q, k, v = (x.reshape(maps, per_map * num_heads, tokens, head_dim) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, added, scale=scale).reshape(windows, num_heads, tokens, head_dim)
