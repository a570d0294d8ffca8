"""The ``triton`` backend of window attention: the kernels, asked in the terms of the op.

Nothing is kept for the backward but the log-sum-exp of a row where a window has more than 64 tokens: the probabilities
cost less to compute again than to read.

Letters: B batch · H W map height and width · C channels · N tokens in one window · h heads · d head dim.
"""

from typing import Any

import torch
from torch import Tensor

from florence_fast.kernels import window_attention as kernels
from florence_fast.kernels.targets import target_of
from florence_fast.ops import _window_attention_torch

HOPPER = 90

_verdicts: dict[tuple[Any, ...], bool] = {}


def window_attention_fwd(
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: None,
    qkv_bias: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """Return the result and what is kept; ``values`` are window_size to cyclic, then train."""
    return kernels.window_attention_fwd(qkv, rel_pos_bias_table, bias, qkv_bias, *values, tf32=_allows_tf32(qkv))


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: None,
    qkv_bias: Tensor | None,
    kept: Tensor,
    needs: list[bool],
    *values: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, table, bias, logit_scale and qkv_bias, None where ``needs`` is false."""
    tf32 = _allows_tf32(qkv)
    needs = [*needs[:3], needs[4]]
    safe_dots = needs_safe_dots(qkv, tf32, *values)
    grads = kernels.window_attention_bwd(
        grad_out, qkv, rel_pos_bias_table, bias, qkv_bias, kept, needs, *values, tf32=tf32, safe_dots=safe_dots
    )
    return *grads[:3], None, grads[3]


def _allows_tf32(qkv: Tensor) -> bool:
    """Say whether the user lets float32 products round their factors to TF32, as torch's own would."""
    return qkv.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


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
    if target_of(qkv.device).arch < HOPPER:
        return False
    if qkv.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # a graph being captured cannot be asked for values
    head_dim = qkv.shape[-1] // (3 * num_heads)
    key = (qkv.device, qkv.dtype, tf32, *window_size, head_dim, any(shift_size))
    if key not in _verdicts:
        _verdicts[key] = not fast_dots_are_right(qkv.device, qkv.dtype, tf32, window_size, shift_size, head_dim)
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
    fast = kernels.window_attention_bwd(
        grad_out, qkv, None, None, None, kept, [True, False, False, False], *values, tf32=tf32, safe_dots=False
    )[0]
    exact_qkv, exact_grad_out = qkv.float(), grad_out.float()
    _, probs = _window_attention_torch.window_attention_fwd(exact_qkv, None, None, None, None, *values, True)
    needs = [True, False, False, False, False]
    exact = _window_attention_torch.window_attention_bwd(
        exact_grad_out, exact_qkv, None, None, None, None, probs, needs, *values
    )[0]
    # Rounding leaves less than 0.01 in bfloat16; the fault leaves more than 0.5. NaN is not right either.
    return bool((fast.float() - exact).norm() <= 0.05 * exact.norm())
