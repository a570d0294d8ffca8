"""Self-attention inside windows that are cut out already: the call that Swin implementations make.

For models whose partition cannot be changed; ``window_attention`` spares its copies (Swin, arXiv 2103.14030, section
3.2).

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops import _backend


def window_attention_partitioned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend within each window of a batch of them.

    ``softmax(scale * q k^T + bias + mask) v`` for each window and head (Swin, equation 4).

    Args:
        q: (B*M, h, N, d), floating; so are k and v.
        k: the keys.
        v: the values.
        bias: (h, N, N), added to the scores of every window.
        mask: (M, N, N), window w being masked by ``mask[w % M]``: floating, added to the scores; or bool, true where
            a query may see a key.
        scale: factor of q k^T, d**-0.5 by default.

    Returns:
        (B*M, h, N, d) in the dtype of q; under autocast in autocast's, unless it is float64.

    Raises:
        TypeError: an argument is no tensor, or a tensor has the wrong dtype.
        ValueError: a shape is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    A query that may see no key gives NaN. No windows give an empty result. A floating mask gets a gradient. Only the
    "reference" backend can be differentiated twice.

    >>> q, k, v = torch.randn(3, 8, 3, 49, 32)
    >>> window_attention_partitioned(q, k, v, torch.zeros(3, 49, 49), torch.ones(4, 49, 49).tril().bool()).shape
    torch.Size([8, 3, 49, 32])
    """
    _check_window_attention_partitioned(q, k, v, bias, mask, scale)
    backend = _backend.choose("window_attention_partitioned", q, k, v, bias, mask, scale)
    q, k, v = map(_backend.autocast_input, (q, k, v))
    if backend == "reference":
        return window_attention_partitioned_reference(q, k, v, bias, mask, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, bias, mask)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _window_attention_partitioned(*tensors, scale, train)[0]


def _check_window_attention_partitioned(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None
) -> None:
    for name, x in {"q": q, "k": k, "v": v, "bias": bias, "mask": mask}.items():
        optional = name in ("bias", "mask")
        if x is None and optional:
            continue
        if not isinstance(x, Tensor) or not (x.is_floating_point() or (name == "mask" and x.dtype == torch.bool)):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            kind = "floating-point or bool" if name == "mask" else "floating-point"
            raise TypeError(f"{name} must be a {kind} tensor, got {got}")
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise ValueError(f"q must have shape (B*M, h, N, d), only B*M being 0 at times, got {tuple(q.shape)}")
    for name, x in {"k": k, "v": v}.items():
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(
                f"{name} must have the shape and dtype of q, {tuple(q.shape)} {q.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
    windows, num_heads, tokens, _ = q.shape
    if bias is not None and bias.shape != (num_heads, tokens, tokens):
        raise ValueError(f"bias must have shape {(num_heads, tokens, tokens)}, got {tuple(bias.shape)}")
    if mask is not None and (mask.ndim != 3 or mask.shape[1:] != (tokens, tokens) or len(mask) == 0):
        raise ValueError(f"mask must have shape (M, {tokens}, {tokens}), got {tuple(mask.shape)}")
    if mask is not None and windows % len(mask):
        raise ValueError(f"mask must be for a number of windows that divides those of q, {windows}, got {len(mask)}")
    for name, x in {"k": k, "v": v, "bias": bias, "mask": mask}.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")


def window_attention_partitioned_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Define ``window_attention_partitioned`` in plain PyTorch: the same, computed in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with _backend.without_autocast(q.device.type):
        scores = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.unflatten(0, (len(q) // len(mask), len(mask)))
            hidden = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask[:, None], -math.inf) if hidden else scores + mask[:, None]
            scores = scores.flatten(0, 1)
        return (scores.softmax(-1).to(wide) @ v.to(wide)).to(q.dtype)


def unsupported_reasons(backend: str, q: Tensor, *_: Any, **__: Any) -> list[str]:
    """Say why ``backend`` cannot run ``window_attention_partitioned``; an empty list means that it can."""
    if backend == "triton":
        return ["no Triton kernel for window_attention_partitioned in this version"]
    if backend == "cpp":
        return ["no native kernel for window_attention_partitioned in this version"]
    return []


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, train: bool
) -> tuple[Tensor, Tensor]:
    """Return the result and, if ``train``, the probabilities: to compute them again is dearer than to read them."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    added = _added_to_scores(bias, mask, q.dtype)
    if not train:
        return _sdpa(q, k, v, added, scale), q.new_empty(0)
    scores = q * scale @ k.mT
    if added is not None:
        scores.view(len(scores) // len(added), len(added), *scores.shape[1:]).add_(added)
    probs = scores.softmax(-1)
    return probs @ v, probs


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, train: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-1], q.shape[2]) if train else 0)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    probs: Tensor,
    needs: list[bool],
    scale: float,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_q, needs_k, needs_v, needs_bias, needs_mask = needs
    d_scores = torch._softmax_backward_data(grad_out @ v.mT, probs, -1, probs.dtype)
    d_mask = None
    if needs_mask:
        d_mask = _sum(d_scores.unflatten(0, (len(q) // len(mask), len(mask))), (0, 2)).to(mask.dtype)
    grads = (
        (d_scores @ k).mul_(scale) if needs_q else None,
        (d_scores.mT @ q).mul_(scale) if needs_k else None,
        probs.mT @ grad_out if needs_v else None,
        _sum(d_scores, (0,)).to(bias.dtype) if needs_bias else None,
        d_mask,
    )
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    probs: Tensor,
    needs: list[bool],
    scale: float,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (q, k, v, bias, mask)
    return tuple(x.new_empty(x.shape) if need else q.new_empty(0) for x, need in zip(tensors, needs, strict=True))


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
    q, k, v = (x.view(maps, per_map * num_heads, tokens, head_dim) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, added, scale=scale).reshape(windows, num_heads, tokens, head_dim)


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q, k, v = torch.randn(3, 8, 2, 16, 8, device=device)
    mask = torch.ones(4, 16, 16, dtype=torch.bool, device=device).tril()
    return (q, k, v, torch.zeros(2, 16, 16, device=device)), {"mask": mask}


_window_attention_partitioned = _backend.define(
    "window_attention_partitioned", 5, _forward, _forward_fake, _backward, _backward_fake
)
_backend.register_entry(
    _backend.OpEntry(
        "window_attention_partitioned",
        window_attention_partitioned,
        window_attention_partitioned_reference,
        unsupported_reasons,
        _example,
    )
)
