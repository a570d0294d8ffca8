"""Self-attention inside windows that are cut out already: the call that Swin implementations make.

For models whose partition cannot be changed; ``window_attention`` spares its copies (Swin, arXiv 2103.14030, section
3.2).

Letters: B batch · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from florence_fast.ops import dispatch
from florence_fast.ops.spec import Op

MAX_TRITON_TOKENS = 784
MAX_TRITON_HEAD_DIM = 128


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

    A query that may see no key gives NaN. No windows give an empty result. A floating mask gets a gradient. Second
    derivatives are the reference's.

    >>> q, k, v = torch.randn(3, 8, 3, 49, 32)
    >>> window_attention_partitioned(q, k, v, torch.zeros(3, 49, 49), torch.ones(4, 49, 49).tril().bool()).shape
    torch.Size([8, 3, 49, 32])
    """
    _check_window_attention_partitioned(q, k, v, bias, mask, scale)
    backend = dispatch.choose("window_attention_partitioned", q, k, v, bias, mask, scale)
    q, k, v = map(dispatch.autocast_input, (q, k, v))
    if backend == "reference":
        return window_attention_partitioned_reference(q, k, v, bias, mask, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _window_attention_partitioned(q, k, v, bias, mask, scale, backend)[0]


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
    with dispatch.without_autocast(q.device.type):
        scores = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.unflatten(0, (len(q) // len(mask), len(mask)))
            hidden = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask[:, None], -math.inf) if hidden else scores + mask[:, None]
            scores = scores.flatten(0, 1)
        return (scores.softmax(-1).to(wide) @ v.to(wide)).to(q.dtype)


def _triton_reasons(q: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons, dtype = dispatch.triton_reasons(q), dispatch.autocast_dtype(q)
    tokens, head_dim = q.shape[2:]
    if tokens > MAX_TRITON_TOKENS:
        reasons.append(f"the kernels hold at most {MAX_TRITON_TOKENS} tokens a window, got {tokens}")
    if head_dim > MAX_TRITON_HEAD_DIM:
        reasons.append(f"the kernels hold at most {MAX_TRITON_HEAD_DIM} channels a head, got {head_dim}")
    if dtype not in dispatch.TRITON_DTYPES:
        reasons.append(f"q must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
    return reasons


# The kernels keep a float32 a row, the log-sum-exp: they compute the probabilities anew. The library calls keep these.
def _outputs(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    train, backend = args[-2:]
    if backend == "triton":
        return q.new_empty(q.shape), q.new_empty(q.shape[:3] if train else 0, dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-1], q.shape[2]) if train else 0)


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q, k, v = torch.randn(3, 8, 2, 16, 8, device=device)
    mask = torch.ones(4, 16, 16, dtype=torch.bool, device=device).tril()
    return (q, k, v, torch.zeros(2, 16, 16, device=device)), {"mask": mask}


_window_attention_partitioned = Op(
    window_attention_partitioned,
    window_attention_partitioned_reference,
    example=_example,
    reasons={"triton": _triton_reasons},
    tensors=5,
    outputs=_outputs,
)
