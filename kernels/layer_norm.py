"""LayerNorm over the last axis, with the residual sum and the drop path before it, forward and backward in one pass.

A program walks over blocks of whole rows, which stay in registers between the statistics and the result. The weights
are read once a program, and the gradients of the weights are summed in registers over its run of blocks; each program
leaves one partial, and the partials are added in a second pass: no atomics, the same bits in every run.

Bytes of an element at 2 bytes each: forward 4 (x in, norm out), 8 with a residual (x, residual in; sum, norm out);
backward 6 (sum, dnorm in; dsum out), 2 more for the gradient of the sum that comes in, 2 more for a dx that is not
dresidual (a drop path). Mean and rstd are not kept: they would be 16 bytes a row more, and the backward holds the
whole row anyway. Statistics are float32, of the sum as it is stored, so that the norm is that of the sum returned.

Compiled for sm_80 and sm_90 at C a multiple of 8 it must show 16-byte loads and stores of the streams and no stack.

Letters: R rows · C channels · B samples, which have R / B rows each.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import target_of

MAX_CHANNELS = 8192
"""The longest row that fits into the registers of one program."""


@triton.jit
def place_rows(block, R, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where block number ``block`` starts (int64), its elements from there, and which of its rows and elements exist.

    (ROWS, BLOCK_C) for elements, (ROWS, 1) for rows. R below 2^31 comes as int32, a larger one as int64.
    """
    first = block * ROWS
    i, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    real = i < R - first
    return first.to(tl.int64) * C, i * C + c, real, real if C == BLOCK_C else real & (c < C)


@triton.jit
def load_weight(ptr, GIVEN: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load one value a channel, (1, BLOCK_C) float32; zeros if there are none, which nobody reads."""
    value = tl.zeros((1, BLOCK_C), tl.float32)
    if GIVEN:
        c = tl.arange(0, BLOCK_C)[None, :]
        value = tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sample_scale(scale_ptr, block, real, rows_per_sample, ROWS: tl.constexpr, SHORT: tl.constexpr):
    """Load the factor of each row's sample, (ROWS, 1); ``SHORT`` is whether a block may hold more than two samples."""
    first = block * ROWS
    sample = first // rows_per_sample
    row = first - sample * rows_per_sample + tl.arange(0, ROWS)[:, None]
    # No division for every row where a block is shorter than a sample.
    sample += row // rows_per_sample if SHORT else (row >= rows_per_sample).to(tl.int32)
    return tl.load(scale_ptr + sample, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x, real, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Give (x - mean) * rstd and rstd of each row of x (ROWS, BLOCK_C), both zero beyond the rows that exist."""
    centred = x - (tl.sum(x, 1) * (1.0 / C))[:, None]
    if C != BLOCK_C:
        centred = tl.where(tl.arange(0, BLOCK_C)[None, :] < C, centred, 0.0)
    variance = (tl.sum(centred * centred, 1) * (1.0 / C))[:, None]
    rstd = tl.where(real, tl.rsqrt(variance + eps), 0.0)
    return centred * rstd, rstd


@triton.jit(do_not_specialize=("R", "rows_per_sample", "eps"))
def _layer_norm_fwd_kernel(
    x_ptr,  # (R, C)
    residual_ptr,  # (R, C); read if HAS_RESIDUAL
    scale_ptr,  # (B,); read if HAS_SCALE
    weight_ptr,  # (C,); read if HAS_WEIGHT
    bias_ptr,  # (C,); read if HAS_BIAS
    sum_ptr,  # (R, C); written if HAS_RESIDUAL
    norm_ptr,  # (R, C)
    R,
    rows_per_sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    weight, bias = load_weight(weight_ptr, HAS_WEIGHT, C, BLOCK_C), load_weight(bias_ptr, HAS_BIAS, C, BLOCK_C)
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        start, offset, real, here = place_rows(block, R, C, ROWS, BLOCK_C)
        x = tl.load(x_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            if HAS_SCALE:
                x *= _sample_scale(scale_ptr, block, real, rows_per_sample, ROWS, SHORT)
            x += tl.load(residual_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
            stored = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + offset, stored, mask=here)
            x = stored.to(tl.float32)
        norm, _ = _normalise(x, real, eps, C, BLOCK_C)
        if HAS_WEIGHT:
            norm *= weight
        if HAS_BIAS:
            norm += bias
        tl.store(norm_ptr + start + offset, norm.to(norm_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=("R", "rows_per_sample", "eps"))
def _layer_norm_bwd_kernel(
    sum_ptr,  # (R, C), what was normalised
    scale_ptr,  # (B,); read if HAS_SCALE
    weight_ptr,  # (C,); read if HAS_WEIGHT
    grad_sum_ptr,  # (R, C), the gradient of the sum itself; read if HAS_GRAD_SUM
    grad_norm_ptr,  # (R, C)
    dsum_ptr,  # (R, C); written if NEEDS_SUM
    dx_ptr,  # (R, C); written if NEEDS_X
    partial_ptr,  # (programs, 2, C) float32, of weight and bias; written if NEEDS_WEIGHT
    R,
    rows_per_sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    NEEDS_SUM: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
):
    weight = load_weight(weight_ptr, HAS_WEIGHT, C, BLOCK_C)
    dweight, dbias = tl.zeros((ROWS, BLOCK_C), tl.float32), tl.zeros((ROWS, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        start, offset, real, here = place_rows(block, R, C, ROWS, BLOCK_C)
        x = tl.load(sum_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad_norm_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        norm, rstd = _normalise(x, real, eps, C, BLOCK_C)
        if NEEDS_WEIGHT:
            dweight += g * norm
            dbias += g
        if NEEDS_SUM or NEEDS_X:
            if HAS_WEIGHT:
                g *= weight
            along_norm = (tl.sum(g * norm, 1) * (1.0 / C))[:, None]
            along_ones = (tl.sum(g, 1) * (1.0 / C))[:, None]
            d = (g - (norm * along_norm + along_ones)) * rstd
            if HAS_GRAD_SUM:
                d += tl.load(grad_sum_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
            if NEEDS_SUM:
                tl.store(dsum_ptr + start + offset, d.to(dsum_ptr.dtype.element_ty), mask=here)
            if NEEDS_X:
                if HAS_SCALE:
                    d *= _sample_scale(scale_ptr, block, real, rows_per_sample, ROWS, SHORT)
                tl.store(dx_ptr + start + offset, d.to(dx_ptr.dtype.element_ty), mask=here)
    if NEEDS_WEIGHT:
        c = tl.arange(0, BLOCK_C)
        partial_ptr += tl.program_id(0) * 2 * C + c
        tl.store(partial_ptr, tl.sum(dweight, 0), mask=c < C)
        tl.store(partial_ptr + C, tl.sum(dbias, 0), mask=c < C)


@dataclass(frozen=True)
class RowCall:
    """One call of a kernel that walks over blocks of rows of ``x``, as its launcher sees it."""

    x: Tensor
    kernel: str
    tile: int
    """Elements of a block, if no row is longer."""
    default: Config

    @property
    def rows(self) -> int:
        return self.x.numel() // self.x.shape[-1]

    @cached_property
    def block_c(self) -> int:
        return max(16, triton.next_power_of_2(self.x.shape[-1]))

    @property
    def block_rows(self) -> int:
        return max(1, self.tile // self.block_c)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Constants C, ROWS and BLOCK_C of every kernel."""
        return self.x.shape[-1], self.block_rows, self.block_c

    @cached_property
    def config(self) -> Config:
        """Return how the kernel is launched: longer rows are spread over more warps."""
        warps = max(self.default.num_warps, min(16, self.block_c // 512))
        programs = max(1, self.default.num_warps * self.default.programs_per_sm // warps)
        default = Config(warps, self.default.num_stages, programs)
        arch = target_of(self.x.device).arch
        return config_of(self.kernel, arch, self.x.dtype, self.block_rows, self.block_c, default)

    @cached_property
    def programs(self) -> int:
        """How many programs share the blocks, so that all of them are on the GPU at once."""
        at_once = self.config.programs_per_sm * target_of(self.x.device).num_sms
        return max(1, min(triton.cdiv(self.rows, self.block_rows), at_once))

    def rows_per_sample(self, scale: Tensor | None) -> tuple[int, bool]:
        """Argument rows_per_sample, and constant SHORT."""
        rows = self.rows if scale is None else self.rows // len(scale)
        return rows, rows < self.block_rows


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sum_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the norm and the sum, which is ``x`` itself without a residual."""
    x = x.contiguous()
    total = x if residual is None else torch.empty_like(x, dtype=sum_dtype)
    norm = torch.empty_like(x, dtype=norm_dtype)
    if x.numel() == 0:
        return norm, total
    call = RowCall(x, "layer_norm_fwd", 2048, Config(num_warps=4, num_stages=1, programs_per_sm=8))
    rows_per_sample, short = call.rows_per_sample(residual_scale)
    _layer_norm_fwd_kernel[(call.programs,)](
        x,
        x if residual is None else residual.contiguous(),
        x if residual_scale is None else residual_scale.contiguous(),
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        total,
        norm,
        call.rows,
        rows_per_sample,
        eps,
        *call.shape,
        residual is not None,
        residual_scale is not None,
        short,
        weight is not None,
        bias is not None,
        **call.config.options,
    )
    return norm, total


def layer_norm_bwd(
    grad_norm: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    residual_scale: Tensor | None,
    weight: Tensor | None,
    dsum_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    needs_weight: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the sum, of x (that of the sum times the factors), and of weight and bias (2, C).

    Each is None unless its dtype is given or ``needs_weight`` is true; the last one is float32.
    """
    total = total.contiguous()
    dsum = None if dsum_dtype is None else torch.empty_like(total, dtype=dsum_dtype)
    dx = None if dx_dtype is None else torch.empty_like(total, dtype=dx_dtype)
    if total.numel() == 0:
        return dsum, dx, total.new_zeros(2, total.shape[-1], dtype=torch.float32) if needs_weight else None
    call = RowCall(total, "layer_norm_bwd", 4096, Config(num_warps=8, num_stages=1, programs_per_sm=2))
    rows_per_sample, short = call.rows_per_sample(residual_scale)
    partial_shape = (call.programs, 2, total.shape[-1]) if needs_weight else (0,)
    partial = total.new_empty(partial_shape, dtype=torch.float32)
    _layer_norm_bwd_kernel[(call.programs,)](
        total,
        total if residual_scale is None else residual_scale.contiguous(),
        total if weight is None else weight.contiguous(),
        total if grad_sum is None else grad_sum,
        grad_norm,
        total if dsum is None else dsum,
        total if dx is None else dx,
        partial,
        call.rows,
        rows_per_sample,
        eps,
        *call.shape,
        residual_scale is not None,
        short,
        weight is not None,
        grad_sum is not None,
        dsum is not None,
        dx is not None,
        needs_weight,
        **call.config.options,
    )
    return dsum, dx, partial.sum(0) if needs_weight else None
