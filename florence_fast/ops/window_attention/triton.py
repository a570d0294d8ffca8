"""The ``triton`` backend of window attention: the kernels, asked in the terms of the op.

Nothing is kept for the backward but the log-sum-exp of a row, where a window is in 3-D, has more than 64 tokens or
attends by cosines: the probabilities cost less to compute again than to read.

Letters: B batch · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from florence_fast.kernels import window_attention as kernels
from florence_fast.kernels.targets import target_of
from florence_fast.ops import dispatch
from florence_fast.ops.window_attention import torch as torch_backend

HOPPER = 90
MAX_TALL_TOKENS = 144

_verdicts: dict[tuple[Any, ...], bool] = {}


def window_attention_fwd(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """Return the result and what is kept; ``values`` are window_size to cyclic, then train."""
    return kernels.window_attention_fwd(
        qkv, rel_pos_bias_table, bias, qkv_bias, *values, tf32=dispatch.allows_tf32(qkv), logit_scale=logit_scale
    )


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    kept: Tensor,
    needs: list[bool],
    *values: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, table, bias, logit_scale and qkv_bias, None where ``needs`` is false."""
    tf32 = dispatch.allows_tf32(qkv)
    safe_dots = logit_scale is None and needs_safe_dots(qkv, tf32, *values)
    *grads, dqkv_bias, dlogit_scale = kernels.window_attention_bwd(
        grad_out,
        qkv,
        rel_pos_bias_table,
        bias,
        qkv_bias,
        kept,
        [*needs[:3], needs[4], needs[3]],
        *values,
        tf32=tf32,
        safe_dots=safe_dots,
        logit_scale=logit_scale,
    )
    return *grads, dlogit_scale, dqkv_bias


def needs_safe_dots(
    qkv: Tensor,
    tf32: bool,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    scale: float,
    pad_mode: str,
    cyclic: list[bool],
) -> bool:
    """Say whether this device and compiler get the faster form of the backward wrong; each form is tried once.

    On Hopper some versions of Triton give wrong values for ``dot(trans(x), y)`` where x is the result of a product,
    and nothing in the compiled code tells a good version from a bad one.
    """
    size = qkv.shape[1:-1]
    window = [min(s, w) for s, w in zip(size, window_size, strict=True)]
    if target_of(qkv.device).arch < HOPPER or math.prod(window[:-2]) > 1 or math.prod(window) > MAX_TALL_TOKENS:
        return False  # the kernels for 3-D and for more tokens have no such product
    if qkv.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # a graph being captured cannot be asked for values
    head_dim = qkv.shape[-1] // (3 * num_heads)
    shift = [0 if s <= w else x for s, w, x in zip(size, window_size, shift_size, strict=True)]
    window, shift = window[-2:], shift[-2:]
    key = (qkv.device, qkv.dtype, tf32, *window, head_dim, any(shift))
    if key not in _verdicts:
        _verdicts[key] = not fast_dots_are_right(qkv.device, qkv.dtype, tf32, window, shift, head_dim)
    return _verdicts[key]


def fast_dots_are_right(
    device: torch.device,
    dtype: torch.dtype,
    tf32: bool,
    window_size: list[int],
    shift_size: list[int],
    head_dim: int,
) -> bool:
    """Run the faster backward on four small windows and compare it with the ``torch`` backend in float32."""
    generator = torch.Generator(device).manual_seed(0)
    size = [2 * w for w in window_size]
    qkv = torch.randn(1, *size, 3 * head_dim, device=device, generator=generator).to(dtype)
    grad_out = torch.randn(1, *size, head_dim, device=device, generator=generator).to(dtype)
    values = (window_size, 1, shift_size, head_dim**-0.5, "mask", [False, False])
    _, kept = kernels.window_attention_fwd(qkv, None, None, None, *values, True, tf32=tf32)
    fast: Any = kernels.window_attention_bwd(
        grad_out, qkv, None, None, None, kept, [True, False, False, False], *values, tf32=tf32, safe_dots=False
    )[0]
    exact_qkv, exact_grad_out = qkv.float(), grad_out.float()
    _, probs = torch_backend.window_attention_fwd(exact_qkv, None, None, None, None, *values, True)
    needs = [True, False, False, False, False]
    exact: Any = torch_backend.window_attention_bwd(
        exact_grad_out, exact_qkv, None, None, None, None, probs, needs, *values
    )[0]
    # Rounding leaves less than 0.01 in bfloat16; the fault leaves more than 0.5. NaN is not right either.
    return bool((fast.float() - exact).norm() <= 0.05 * exact.norm())
