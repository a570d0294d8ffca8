"""Swin's patch merging: gather 2x2 neighbours, LayerNorm over their 4C channels, product to 2C, in one pass over x.

LayerNorm commutes with the product. With G = norm_weight * weight, rounded to the dtype of x,

    out = rstd * (x G^T - mean * sum(G)) + weight norm_bias

so the product runs on raw x while each row's statistics are summed beside it, and the 4C tensor is never written. The
column sums are those of the rounded G: what rounding does to it then cancels as the mean does. The statistics are
sums of x - x_0, x_0 being the mean of the row's first 16 elements, which one read brings: (x_0 - mean)^2 is at most C/4
times the variance, so that even an outlier among them leaves the variance right. In float32 the product runs on x - x_0
too, for the same reason; 16 bits would round the difference.

The kernels number the 4C elements of a row as they lie in memory, (dy, dx, C), two runs of 2C each; Swin's order is
(dx, dy, C), and G, which is written anew in every call, is where the two meet.

Bytes of a row: forward 6 C s (4C in, 2C out), with 8 C^2 s of G, which stays in the L2 cache. The backward works on
chunks of rows, two scratches of 4C a row and SCRATCH_BYTES together, which are meant to stay there as well: a kernel
gathers and normalises, the library multiplies, a kernel takes the gradient through the norm and scatters it. All sums
are float32 and in a fixed order.

Compiled for sm_80 and sm_90 in 16 bits it must show tensor instructions in its loops, 16-byte loads of x and no stack.

Letters: B batch · H W map height and width · C channels · M merged tokens of the whole batch, B ceil(H/2) ceil(W/2) ·
s bytes of an element.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import Target, target_of

SCRATCH_BYTES = 32 << 20
"""What the two scratches of the backward hold together: less than the L2 cache of an A100 (40 MB)."""

MAX_CHANNELS = 2048
"""The widest map whose merged rows fit into the registers of one program of the backward."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_SIZES = ["H", "W", "M"]
"""Arguments whose divisibility tells the compiler nothing: a new map must not compile again."""


@triton.jit
def _place_rows(m, H, W, C: tl.constexpr):
    """Row and column of the first of the four tokens that merge into number ``m``, and its place in x (int64)."""
    half_h, half_w = tl.cdiv(H, 2), tl.cdiv(W, 2)
    line = m // half_w
    y, x = 2 * (line % half_h), 2 * (m % half_w)
    return y, x, ((line // half_h * H + y).to(tl.int64) * W + x) * C


@triton.jit
def _patch_merging_fold_kernel(
    weight_ptr,  # (2C, 4C)
    norm_weight_ptr,  # (4C,)
    norm_bias_ptr,  # (4C,)
    folded_ptr,  # (2C, 4C), the channels in the order of memory
    colsum_ptr,  # (2C,) float32
    shift_ptr,  # (2C,) float32
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write G for ROWS outputs, its sums over the channels, and the products with norm_bias."""
    n, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    colsum, shift = tl.zeros((ROWS, BLOCK_C), tl.float32), tl.zeros((ROWS, BLOCK_C), tl.float32)
    for part in tl.static_range(4):
        swin = (part % 2 * 2 + part // 2) * C + c
        weight = tl.load(weight_ptr + n * (4 * C) + swin, mask=c < C, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + swin, mask=c < C, other=0.0).to(tl.float32)
        folded = (weight * norm_weight).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + n * (4 * C) + part * C + c, folded, mask=c < C)
        colsum += folded.to(tl.float32)
        shift += weight * tl.load(norm_bias_ptr + swin, mask=c < C, other=0.0).to(tl.float32)
    tl.store(colsum_ptr + n, tl.sum(colsum, 1, keep_dims=True))
    tl.store(shift_ptr + n, tl.sum(shift, 1, keep_dims=True))


@triton.jit
def _settled(product):
    """Return ``product`` such that the next trip of a loop cannot begin before it is complete.

    Triton's pipeliner leaves the wgmma of a trip running while the next one is prepared. If a tile feeds a wgmma and
    anything else, its buffer is then overwritten while it is still read: silently wrong values (triton #6691). An
    empty instruction that reads the product makes the compiler wait for it; it costs no instruction and no register.
    """
    if _INTERPRETED:
        return product
    else:
        return tl.inline_asm_elementwise("", "=r,0", [product], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _multiply(
    row_ptr,  # (BLOCK_M, 1): where the rows begin
    origin,  # (BLOCK_M, 1) float32: x_0
    inside,  # (BLOCK_M, 1) of the neighbour below and to the right: whether it is on the map
    folded_ptr,
    column,
    W,
    depth,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Product of the rows with BLOCK_N columns of G, and with BLOCK_N2 more, and the sums of x - x_0 and its square.

    What is not asked for is zeros, which cost nothing. ``depth`` is 4C, and no constant: compilers would unroll.
    """
    FAR: tl.constexpr = BLOCK_N2 if BLOCK_N2 > 0 else 1  # Triton 3.4 and 3.5 make no constant of max()
    k = tl.arange(0, BLOCK_K)[None, :]
    folded_ptr += column * (4 * C)
    near_ptr = folded_ptr + tl.arange(0, BLOCK_N)[:, None] * (4 * C) + k
    far_ptr = folded_ptr + (BLOCK_N + tl.arange(0, FAR))[:, None] * (4 * C) + k
    near, far = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, FAR), tl.float32)
    total, square = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32), tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)
    for first in range(0, depth, BLOCK_K):
        below = first >= 2 * C
        place = row_ptr + (tl.where(below, W * C - 2 * C, 0) + first) + k
        if RAGGED:
            right = first - tl.where(below, 2 * C, 0) + k >= C
            x = tl.load(place, mask=(inside[0] | ~below) & (inside[1] | ~right), other=0.0)
        else:
            x = tl.load(place)
        if STATISTICS or SHIFT:
            shifted = x.to(tl.float32) - origin
        if STATISTICS:
            # Eight neighbours belong to one thread: their sum takes an eighth of the registers.
            total += tl.sum(tl.reshape(shifted, (BLOCK_M, BLOCK_K // 8, 8)), 2)
            square += tl.sum(tl.reshape(shifted * shifted, (BLOCK_M, BLOCK_K // 8, 8)), 2)
        if SHIFT:
            x = shifted
        near = tl.dot(x, tl.trans(tl.load(near_ptr + first)), near, input_precision=PRECISION)
        if BLOCK_N2 > 0:
            far = tl.dot(x, tl.trans(tl.load(far_ptr + first)), far, input_precision=PRECISION)
        if STATISTICS and not SHIFT:  # x feeds the product and the sums
            near = _settled(near)
            if BLOCK_N2 > 0:
                far = _settled(far)
    return near, far, total, square


@triton.jit
def _finish(product, mean, rstd, real, out_ptr, colsum_ptr, shift_ptr, column, C: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise a product (rows, BLOCK) afterwards, and store it; ``out_ptr`` (rows, 1) is where the rows begin."""
    n = column + tl.arange(0, BLOCK)[None, :]
    out = (product - mean * tl.load(colsum_ptr + n)) * rstd + tl.load(shift_ptr + n)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=[*_SIZES, "groups", "eps"])
def _patch_merging_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    folded_ptr,  # (2C, 4C)
    colsum_ptr,  # (2C,) float32
    shift_ptr,  # (2C,) float32
    out_ptr,  # (M, 2C)
    H,
    W,
    M,
    groups,
    depth,
    eps,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Merge BLOCK_M rows into one of ``groups`` runs of columns; the first block of a run takes the statistics."""
    WIDTH: tl.constexpr = BLOCK_N + BLOCK_N2
    BLOCKS: tl.constexpr = 2 * C // WIDTH
    row_block, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the last read what the last one reads.
    y, x, place = _place_rows(tl.minimum(m, M - 1), H, W, C)
    row_ptr, real = x_ptr + place[:, None], (m < M)[:, None]
    origin = tl.sum(tl.load(row_ptr + tl.arange(0, 16)[None, :]).to(tl.float32), 1, keep_dims=True) * (1.0 / 16)
    inside = ((y + 1 < H)[:, None], (x + 1 < W)[:, None])
    out_ptr += m.to(tl.int64)[:, None] * (2 * C)
    column = BLOCKS * group // groups * WIDTH
    near, far, total, square = _multiply(
        row_ptr,
        origin,
        inside,
        folded_ptr,
        column,
        W,
        depth,
        C,
        BLOCK_M,
        BLOCK_N,
        BLOCK_N2,
        BLOCK_K,
        RAGGED,
        SHIFT,
        PRECISION,
        True,
    )
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / (4 * C))
    variance = tl.sum(square, 1, keep_dims=True) * (1.0 / (4 * C)) - mean * mean
    rstd = tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
    if not SHIFT:
        mean += origin
    _finish(near, mean, rstd, real, out_ptr, colsum_ptr, shift_ptr, column, C, BLOCK_N)
    if BLOCK_N2 > 0:
        _finish(far, mean, rstd, real, out_ptr, colsum_ptr, shift_ptr, column + BLOCK_N, C, BLOCK_N2)
    if BLOCKS > 1:
        for block in range(BLOCKS * group // groups + 1, BLOCKS * (group + 1) // groups):
            near, far, total, square = _multiply(
                row_ptr,
                origin,
                inside,
                folded_ptr,
                block * WIDTH,
                W,
                depth,
                C,
                BLOCK_M,
                BLOCK_N,
                BLOCK_N2,
                BLOCK_K,
                RAGGED,
                SHIFT,
                PRECISION,
                False,
            )
            _finish(near, mean, rstd, real, out_ptr, colsum_ptr, shift_ptr, block * WIDTH, C, BLOCK_N)
            if BLOCK_N2 > 0:
                _finish(far, mean, rstd, real, out_ptr, colsum_ptr, shift_ptr, block * WIDTH + BLOCK_N, C, BLOCK_N2)


@triton.jit
def _place_parts(i, first_row, last_row, H, W, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Places (rows, 4, BLOCK_C) of rows ``i`` of a chunk in x and in the chunk, and whether they are on the map."""
    y, x, place = _place_rows(tl.minimum(first_row + i, last_row), H, W, C)
    part, c = tl.arange(0, 4)[None, :, None], tl.arange(0, BLOCK_C)[None, None, :]
    dy, dx = part // 2, part % 2
    here = (y[:, None, None] + dy < H) & (x[:, None, None] + dx < W) & (c < C)
    in_x = place[:, None, None] + ((dy * W + dx) * C + c)
    return in_x, i.to(tl.int64)[:, None, None] * (4 * C) + part * C + c, here, c < C


@triton.jit
def _mean(x, C: tl.constexpr):
    """Mean of each row (rows, 4, BLOCK_C), as (rows, 1, 1)."""
    return (tl.sum(tl.sum(x, 2), 1) * (1.0 / (4 * C)))[:, None, None]


@triton.jit(do_not_specialize=[*_SIZES[:2], "first_row", "rows", "eps"])
def _patch_merging_gather_kernel(
    x_ptr,  # (B, H, W, C)
    norm_ptr,  # (rows, 4C) of the chunk that begins at first_row: (x - mean) * rstd
    rstd_ptr,  # (rows,) float32
    H,
    W,
    first_row,
    rows,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_x, in_chunk, here, in_row = _place_parts(i, first_row, first_row + rows - 1, H, W, C, BLOCK_C)
    x = tl.load(x_ptr + in_x, mask=here, other=0.0).to(tl.float32)
    centred = tl.where(in_row, x - _mean(x, C), 0.0)
    rstd = tl.rsqrt(_mean(centred * centred, C) + eps)
    real = (i < rows)[:, None, None]
    tl.store(norm_ptr + in_chunk, (centred * rstd).to(norm_ptr.dtype.element_ty), mask=real & in_row)
    tl.store(rstd_ptr + i[:, None, None], rstd, mask=real)


@triton.jit(do_not_specialize=[*_SIZES[:2], "first_row", "rows"])
def _patch_merging_scatter_kernel(
    dnorm_ptr,  # (rows, 4C): the gradient of what the gather left in norm
    norm_ptr,  # (rows, 4C)
    rstd_ptr,  # (rows,) float32
    dx_ptr,  # (B, H, W, C)
    H,
    W,
    first_row,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_x, in_chunk, here, in_row = _place_parts(i, first_row, first_row + rows - 1, H, W, C, BLOCK_C)
    real = (i < rows)[:, None, None]
    d = tl.load(dnorm_ptr + in_chunk, mask=real & in_row, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + in_chunk, mask=real & in_row, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + i[:, None, None], mask=real, other=0.0)
    dx = (d - (_mean(d, C) + norm * _mean(d * norm, C))) * rstd
    tl.store(dx_ptr + in_x, dx.to(dx_ptr.dtype.element_ty), mask=here & real)


@dataclass(frozen=True)
class MergeCall:
    """One merge of a map, as the launchers see it."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    eps: float
    tf32: bool

    @property
    def channels(self) -> int:
        return self.x.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[1], self.x.shape[2]

    @property
    def merged_size(self) -> tuple[int, int]:
        return triton.cdiv(self.size[0], 2), triton.cdiv(self.size[1], 2)

    @property
    def rows(self) -> int:
        """M."""
        return len(self.x) * self.merged_size[0] * self.merged_size[1]

    @cached_property
    def target(self) -> Target:
        return target_of(self.x.device)

    @property
    def chunk(self) -> tuple[int, int]:
        """Constants ROWS and BLOCK_C of the kernels that work on chunks."""
        block_c = max(16, triton.next_power_of_2(self.channels))
        return max(1, 1024 // block_c), block_c

    def config(self, kernel: str, default: Config) -> Config:
        return config_of(kernel, self.target.arch, self.x.dtype, 0, self.channels, default)

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return G (2C, 4C) in the order of memory, the sums of its rows and weight norm_bias (2C,) in float32."""
        columns = 2 * self.channels
        folded = self.x.new_empty(columns, 2 * columns)
        colsum, shift = (self.x.new_empty(columns, dtype=torch.float32) for _ in range(2))
        parameters = (self.weight, self.norm_weight, self.norm_bias)
        rows = 8  # divides every 2C
        _patch_merging_fold_kernel[(columns // rows,)](
            *(p.contiguous() for p in parameters), folded, colsum, shift, self.channels, rows, self.chunk[1]
        )
        return folded, colsum, shift


def _column_blocks(columns: int, dtype: torch.dtype, arch: int) -> tuple[int, int]:
    """Return BLOCK_N and BLOCK_N2: powers of two whose sum divides 2C, as wide as registers and shared memory allow."""
    narrow = ((64, 32), (64, 0), (32, 0))
    if dtype == torch.float32:
        widths = narrow[1:]
    else:
        # GPUs for desktops, such as 12.0, have less shared memory than data centre ones.
        widths = ((128, 128), (128, 64), (128, 0)) if 90 <= arch < 120 else ((128, 0), (128, 64))
        widths = (*widths, *narrow)
    return next(width for width in widths if columns % sum(width) == 0)


def _column_groups(row_blocks: int, column_blocks: int, at_once: int) -> int:
    """Into how many runs the columns are cut: few rows fill the GPU only so, at the price of statistics taken anew."""

    def cost(groups: int) -> int:
        waves = triton.cdiv(row_blocks * groups, at_once)
        return waves * (2 * triton.cdiv(column_blocks, groups) + 1)  # statistics cost half a block of columns

    return min(range(1, column_blocks + 1), key=cost)


def patch_merging_fwd(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, tf32: bool
) -> Tensor:
    """Return the merged map (B, ceil(H/2), ceil(W/2), 2C) of ``x`` (B, H, W, C), C a multiple of 16."""
    call = MergeCall(x.contiguous(), norm_weight, norm_bias, weight, eps, tf32)
    channels = call.channels
    assert channels % 16 == 0, f"C must be a multiple of 16, got {channels}"
    out = x.new_empty(len(x), *call.merged_size, 2 * channels)
    if out.numel() == 0:
        return out
    wide = x.dtype == torch.float32
    block_m, (block_n, block_n2) = 64 if wide else 128, _column_blocks(2 * channels, x.dtype, call.target.arch)
    config = call.config("patch_merging_fwd", Config(4 if wide else 8, 2 if wide else 3, 1))
    block_k = next(k for k in ((32,) if wide else (64, 32)) if 2 * channels % k == 0)
    row_blocks, column_blocks = triton.cdiv(call.rows, block_m), 2 * channels // (block_n + block_n2)
    groups = _column_groups(row_blocks, column_blocks, call.target.num_sms * config.programs_per_sm)
    _patch_merging_fwd_kernel[(row_blocks * groups,)](
        call.x,
        *call.fold(),
        out,
        *call.size,
        call.rows,
        groups,
        4 * channels,
        eps,
        channels,
        block_m,
        block_n,
        block_n2,
        block_k,
        any(side % 2 for side in call.size),
        wide,
        "tf32" if tf32 else "ieee",
        **config.options,
    )
    return out


def patch_merging_bwd(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    needs: list[bool],
    eps: float,
    tf32: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, norm_weight, norm_bias and weight, None where ``needs`` is false.

    With n the normalised rows and P = grad_out^T n, those of the parameters are sums over P and the columns of
    grad_out: dweight = P norm_weight + sum(grad_out) norm_bias, dnorm_weight = sum over outputs of weight P.
    """
    needs_x, needs_norm_weight, needs_norm_bias, needs_weight = needs
    weight = weight.contiguous()  # sums over it go in one order, whatever its strides are
    call = MergeCall(x.contiguous(), norm_weight, norm_bias, weight, eps, tf32)
    channels, rows = call.channels, call.rows
    dx = torch.empty_like(call.x) if needs_x else None
    grad_out = grad_out.reshape(rows, 2 * channels)
    folded = call.fold()[0] if needs_x else None
    products = x.new_zeros(2 * channels, 4 * channels, dtype=torch.float32)
    step = max(1, SCRATCH_BYTES // (2 * 4 * channels * x.element_size()))
    scratch = [x.new_empty(min(step, rows), 4 * channels) for _ in range(1 + needs_x)]
    for first in range(0, rows if needs_x or needs_norm_weight or needs_weight else 0, step):
        grad = grad_out[first : first + step]
        norm, rstd = scratch[0][: len(grad)], x.new_empty(len(grad), dtype=torch.float32)
        _launch_chunk(call, "gather", first, len(grad), call.x, norm, rstd)
        if needs_norm_weight or needs_weight:
            _add_product_(products, grad.T, norm)
        if needs_x:
            dnorm = torch.mm(grad, folded, out=scratch[1][: len(grad)])
            _launch_chunk(call, "scatter", first, len(grad), dnorm, norm, rstd, dx)
    total = grad_out.sum(0, dtype=torch.float32)
    products = products.unflatten(1, (2, 2, channels)).transpose(1, 2).flatten(1)  # in Swin's order
    dnorm_weight = (products * weight).sum(0) if needs_norm_weight else None
    dnorm_bias = total @ weight.float() if needs_norm_bias else None
    dweight = products * norm_weight + torch.outer(total, norm_bias.float()) if needs_weight else None
    parameters = (dnorm_weight, norm_weight), (dnorm_bias, norm_bias), (dweight, weight)
    return dx, *(None if grad is None else grad.to(parameter.dtype) for grad, parameter in parameters)


def _launch_chunk(call: MergeCall, kernel: str, first: int, rows: int, *tensors: Tensor) -> None:
    """Launch the kernel that gathers, or the one that scatters, on the rows of a chunk."""
    config = call.config(f"patch_merging_{kernel}", Config(num_warps=4, num_stages=1))
    sizes = (*call.size, first, rows)
    grid = (triton.cdiv(rows, call.chunk[0]),)
    if kernel == "gather":
        _patch_merging_gather_kernel[grid](*tensors, *sizes, call.eps, call.channels, *call.chunk, **config.options)
    else:
        _patch_merging_scatter_kernel[grid](*tensors, *sizes, call.channels, *call.chunk, **config.options)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to ``total``, summing in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)
