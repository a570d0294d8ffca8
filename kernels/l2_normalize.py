"""Rows divided by their length, forward and backward in one pass each: ``x / max(|x|, eps)``.

A program walks over blocks of whole rows, which stay in registers between the length and the result. Bytes of an
element at 2 bytes each: forward 4 (x in, result out), backward 6 (x, dout in; dx out). The length is not kept, the
backward holds the row and computes it again. Lengths are float32, the result has the dtype that is asked for.

Compiled for sm_80 and sm_90 at D a multiple of 8 it must show 16-byte loads and stores of the streams and no stack.

Letters: R rows · D length of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.layer_norm import RowCall, place_rows


@triton.jit
def _length(x, eps):
    """Give the length of each row of x (R, D) and the factor that normalises it, both (R, 1)."""
    length = tl.sqrt(tl.sum(x * x, 1))[:, None]
    return length, 1.0 / tl.where(length < eps, eps, length)  # NaN stays NaN


@triton.jit(do_not_specialize=("R", "eps"))
def _l2_normalize_fwd_kernel(
    x_ptr,  # (R, D)
    out_ptr,  # (R, D)
    R,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        start, offset, _, here = place_rows(block, R, D, ROWS, BLOCK_D)
        x = tl.load(x_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        _, factor = _length(x, eps)
        tl.store(out_ptr + start + offset, (x * factor).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=("R", "eps"))
def _l2_normalize_bwd_kernel(
    x_ptr,  # (R, D)
    dout_ptr,  # (R, D)
    dx_ptr,  # (R, D)
    R,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        start, offset, _, here = place_rows(block, R, D, ROWS, BLOCK_D)
        x = tl.load(x_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dout_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        length, factor = _length(x, eps)
        out = x * factor
        # A row shorter than eps is divided by a constant.
        along = tl.where(length < eps, 0.0, tl.sum(g * out, 1)[:, None])
        tl.store(dx_ptr + start + offset, ((g - out * along) * factor).to(dx_ptr.dtype.element_ty), mask=here)


def l2_normalize_fwd(x: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return the normalised rows."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=out_dtype)
    if x.numel() > 0:
        call = RowCall(x, "l2_normalize_fwd", 2048, Config(num_warps=4, num_stages=1, programs_per_sm=8))
        _l2_normalize_fwd_kernel[(call.programs,)](x, out, call.rows, eps, *call.shape, **call.config.options)
    return out


def l2_normalize_bwd(grad_out: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of ``x``."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    if x.numel() > 0:
        call = RowCall(x, "l2_normalize_bwd", 2048, Config(num_warps=4, num_stages=1, programs_per_sm=8))
        _l2_normalize_bwd_kernel[(call.programs,)](x, grad_out, dx, call.rows, eps, *call.shape, **call.config.options)
    return dx
