"""Bias and GELU between the two products of an MLP, and their gradient with the activation computed anew.

A program owns a block of columns, whose bias and gradient of the bias stay in registers, and walks over rows. Each
program of the backward leaves one partial gradient of the bias; they are added in a second pass: no atomics.

Bytes of an element at 2 bytes each: forward 4 (hidden in, activation out), backward 8 (hidden, dactivation in;
activation, dhidden out). The activation that the second product's gradient needs is written again instead of kept, so
that the wide tensor is kept once. Arithmetic is float32; results have the dtype of ``hidden``.

Compiled for sm_80 and sm_90 at F a multiple of 8 it must show 16-byte loads and stores of the streams and no stack.

Letters: R rows · F hidden width.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import target_of

_LOG2_E = tl.constexpr(math.log2(math.e))
_HALF_LOG2_E = tl.constexpr(math.log2(math.e) / 2)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TANH_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -_LOG2_E))


@triton.jit
def _normal(z, EXACT: tl.constexpr):
    """Give the distribution function of the standard normal at z, and its density."""
    bell = tl.exp2(z * z * -_HALF_LOG2_E)
    if EXACT:
        below = 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)
    else:
        # Abramowitz and Stegun 7.1.26: within 3e-7 in float32, far below the rounding of a 16-bit result. With the
        # library's erf the instructions of the forward would take longer than the memory of an H200.
        t = 1.0 / (1.0 + tl.abs(z) * (0.3275911 * _SQRT_HALF))
        tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail *= 0.5 * bell
        below = tl.where(z < 0, tail, 1.0 - tail)
    return below, bell * _NORMAL_DENSITY


@triton.jit
def _activate(z, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Give the activation of z and its derivative; what is not used costs nothing."""
    if KIND == "gelu":
        share, density = _normal(z, EXACT)
        slope = share + z * density
    elif KIND == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the sigmoid of 2y.
        share = _sigmoid((z + 0.044715 * z * z * z) * _TANH_SLOPE)
        slope = share + z * share * (1.0 - share) * ((1.0 + 3 * 0.044715 * z * z) * _TANH_SLOPE)
    else:
        share = _sigmoid(1.702 * z)
        slope = share + z * share * (1.0 - share) * 1.702
    return z * share, slope


@triton.jit
def _place_tile(block, R, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Where the tile of rows number ``block`` starts (int64), its elements from there, and which of them exist."""
    first = block * ROWS
    i, f = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_F)[None, :]
    column = tl.program_id(0) % tl.cdiv(F, BLOCK_F) * BLOCK_F
    here = i < R - first
    return first.to(tl.int64) * F + column, i * F + f, here if F % BLOCK_F == 0 else here & (column + f < F)


@triton.jit
def _load_bias(bias_ptr, GIVEN: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Load this program's columns of the bias, (1, BLOCK_F) float32; zeros if there is none."""
    column = tl.program_id(0) % tl.cdiv(F, BLOCK_F) * BLOCK_F
    f = column + tl.arange(0, BLOCK_F)[None, :]
    bias = tl.zeros((1, BLOCK_F), tl.float32)
    if GIVEN:
        bias = tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    return bias


@triton.jit(do_not_specialize=("R",))
def _bias_activation_fwd_kernel(
    hidden_ptr,  # (R, F)
    bias_ptr,  # (F,); read if HAS_BIAS
    out_ptr,  # (R, F), may be hidden
    R,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
):
    columns: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    bias = _load_bias(bias_ptr, HAS_BIAS, F, BLOCK_F)
    for block in range(tl.program_id(0) // columns, tl.cdiv(R, ROWS), tl.num_programs(0) // columns):
        start, offset, here = _place_tile(block, R, F, ROWS, BLOCK_F)
        z = tl.load(hidden_ptr + start + offset, mask=here, other=0.0).to(tl.float32) + bias
        out, _ = _activate(z, KIND, EXACT)
        tl.store(out_ptr + start + offset, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=("R",))
def _bias_activation_bwd_kernel(
    hidden_ptr,  # (R, F)
    bias_ptr,  # (F,); read if HAS_BIAS
    dout_ptr,  # (R, F)
    out_ptr,  # (R, F), the activation; written if NEEDS_OUT
    dhidden_ptr,  # (R, F), may be dout
    partial_ptr,  # (runs, F) float32; written if NEEDS_BIAS
    R,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    NEEDS_OUT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
):
    columns: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    run = tl.program_id(0) // columns
    bias = _load_bias(bias_ptr, HAS_BIAS, F, BLOCK_F)
    dbias = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(run, tl.cdiv(R, ROWS), tl.num_programs(0) // columns):
        start, offset, here = _place_tile(block, R, F, ROWS, BLOCK_F)
        z = tl.load(hidden_ptr + start + offset, mask=here, other=0.0).to(tl.float32) + bias
        g = tl.load(dout_ptr + start + offset, mask=here, other=0.0).to(tl.float32)
        out, slope = _activate(z, KIND, EXACT)
        if NEEDS_OUT:
            tl.store(out_ptr + start + offset, out.to(out_ptr.dtype.element_ty), mask=here)
        g *= slope
        if NEEDS_BIAS:
            dbias += g
        tl.store(dhidden_ptr + start + offset, g.to(dhidden_ptr.dtype.element_ty), mask=here)
    if NEEDS_BIAS:
        f = tl.program_id(0) % columns * BLOCK_F + tl.arange(0, BLOCK_F)
        tl.store(partial_ptr + run * F + f, tl.sum(dbias, 0), mask=f < F)


@dataclass(frozen=True)
class _TileCall:
    """One call of a kernel that walks over tiles of ``hidden``, as its launcher sees it."""

    hidden: Tensor
    kernel: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Constants F, ROWS and BLOCK_F of every kernel."""
        width = self.hidden.shape[1]
        block_f = min(128, max(16, triton.next_power_of_2(width)))
        return width, 2048 // block_f, block_f

    @cached_property
    def config(self) -> Config:
        default = Config(num_warps=4, num_stages=1, programs_per_sm=8)
        arch = target_of(self.hidden.device).arch
        return config_of(self.kernel, arch, self.hidden.dtype, *self.shape[1:], default)

    @cached_property
    def columns(self) -> int:
        """Into how many blocks the columns are cut."""
        return triton.cdiv(self.shape[0], self.shape[2])

    @cached_property
    def runs(self) -> int:
        """How many programs share the rows of one block of columns, so that all programs are on the GPU at once."""
        at_once = self.config.programs_per_sm * target_of(self.hidden.device).num_sms
        return max(1, min(triton.cdiv(len(self.hidden), self.shape[1]), at_once // self.columns))


def bias_activation_fwd(hidden: Tensor, bias: Tensor | None, activation: str, in_place: bool) -> Tensor:
    """Return the activation of ``hidden`` (R, F) plus ``bias``, in the memory of ``hidden`` if ``in_place``."""
    out = hidden if in_place else torch.empty_like(hidden)
    if hidden.numel() > 0:
        call = _TileCall(hidden, "bias_activation_fwd")
        _bias_activation_fwd_kernel[(call.columns * call.runs,)](
            hidden,
            hidden if bias is None else bias.contiguous(),
            out,
            len(hidden),
            *call.shape,
            bias is not None,
            activation,
            hidden.dtype == torch.float32,
            **call.config.options,
        )
    return out


def bias_activation_bwd(
    grad_out: Tensor, hidden: Tensor, bias: Tensor | None, activation: str, needs_out: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of ``hidden``, in the memory of ``grad_out``, the activation, and the bias's gradient.

    The last two are None unless asked for; the gradient of the bias is float32.
    """
    out = torch.empty_like(hidden) if needs_out else None
    if hidden.numel() == 0:
        return grad_out, out, hidden.new_zeros(hidden.shape[1], dtype=torch.float32) if needs_bias else None
    call = _TileCall(hidden, "bias_activation_bwd")
    partial = hidden.new_empty((call.runs, hidden.shape[1]) if needs_bias else (0,), dtype=torch.float32)
    _bias_activation_bwd_kernel[(call.columns * call.runs,)](
        hidden,
        hidden if bias is None else bias.contiguous(),
        grad_out,
        hidden if out is None else out,
        grad_out,
        partial,
        len(hidden),
        *call.shape,
        bias is not None,
        activation,
        hidden.dtype == torch.float32,
        needs_out,
        needs_bias,
        **call.config.options,
    )
    return grad_out, out, partial.sum(0) if needs_bias else None
