"""The samples of a deformable convolution: columns for the product, and the gradients through them, without atomics.

A *sample* is one tap of one output place, for one offset group: four pixels of the map, weighed by how near they lie
and by the mask. Where they lie is computed once, one sample a thread, and read by the kernels that move channels, whose
32 lanes would otherwise each compute it. ``sample`` writes the columns that the library multiplies with the weight.
``sample_gradients`` gives the gradients of offset and mask from those of the columns, and samples anew in the same
pass. ``input_gradient`` sorts the samples by their upper left pixel, and each pixel adds what the samples around it
say, in an order that depends on the offsets alone: the same bits in every run.

Bytes of a sample of CG channels, at s bytes an element: 16 + 16 for where it lies, each way; columns s CG out;
gradients s CG in, s CG out where columns are wanted, and 16 out and in; input s CG in, once for each of four corners,
and a sort of one key. The map itself is read from the cache: neighbouring samples share its pixels. Positions, weights
and sums are float32.

Compiled for sm_80 and sm_90 at CG = 256 in 16 bits it must show 16-byte loads and stores of the channels and no stack.

Letters: B batch · H W map height and width · C channels · G offset groups · CG channels of one · K taps, kh times kw ·
P places of the output map · R samples, numbered (B, P, K, G); pixels are numbered (B, H, W, G).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import target_of

SIZES = ["num_pixels", "num_samples", "H", "W", "P", "out_w"]
"""Arguments whose divisibility tells the compiler nothing: a new map must not compile again."""


@triton.jit
def _part(position, LAST):
    """Whole and fractional part of a position, no farther off the map than where all is zero; NaN in the fraction."""
    clamped = tl.minimum(tl.maximum(position, -2.0), LAST.to(tl.float32))
    clamped = tl.where(position == position, clamped, -2.0)
    whole = tl.floor(clamped)
    return whole.to(tl.int32), tl.where(position == position, clamped - whole, position)


@triton.jit
def _locate(
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    sample,  # (BLOCK_R,)
    num_samples,
    sizes,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,  # kernel size, stride, padding and dilation, each (y, x)
    MASKED: tl.constexpr,
):
    """Give image and group of each sample, its upper left pixel, the fractions, the modulation, and its place in mask.

    Its two offsets lie at that place plus P times the number of its row in (B, G, K), and P behind.
    """
    H, W, P, out_w = sizes
    KH: tl.constexpr = GEOMETRY[0]
    KW: tl.constexpr = GEOMETRY[1]
    real = sample < num_samples
    group, tap, place = sample % G, sample // G % (KH * KW), sample // (G * KH * KW)
    image, place = place // P, place % P
    row = ((image * G + group) * (KH * KW) + tap).to(tl.int64) * P
    at = row + place
    dy = tl.load(offset_ptr + at + row, mask=real, other=0.0).to(tl.float32)
    dx = tl.load(offset_ptr + at + row + P, mask=real, other=0.0).to(tl.float32)
    modulation = tl.full(sample.shape, 1.0, tl.float32)
    if MASKED:
        modulation = tl.load(mask_ptr + at, mask=real, other=0.0).to(tl.float32)
    y = (place // out_w * GEOMETRY[2] - GEOMETRY[4] + tap // KW * GEOMETRY[6]).to(tl.float32) + dy
    x = (place % out_w * GEOMETRY[3] - GEOMETRY[5] + tap % KW * GEOMETRY[7]).to(tl.float32) + dx
    y, fy = _part(y, H)
    x, fx = _part(x, W)
    return image, group, y, x, fy, fx, modulation, row, at


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_locate_kernel(
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    pixel_ptr,  # (R, 4) int32, num_pixels where off the map; or (R,), see below, if BINS
    weight_ptr,  # (R, 4) float32
    num_pixels,
    num_samples,
    H,
    W,
    P,
    out_w,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BINS: tl.constexpr,
):
    """Write the four pixels of each sample and what they weigh; or, if BINS, its upper left pixel as a bin.

    Bins are numbered (B, G, 1 + H, 1 + W), for that pixel may lie one off the map. Those farther off go past the last.
    """
    sample = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    # fmt: off
    image, group, y, x, fy, fx, modulation, _, _ = _locate(
        offset_ptr, mask_ptr, sample, num_samples, (H, W, P, out_w),
        G, GEOMETRY, MASKED)
    # fmt: on
    real, at = sample < num_samples, sample.to(tl.int64) * 4
    for corner in tl.static_range(4):
        cy, cx = y + corner // 2, x + corner % 2
        inside = (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
        pixel = tl.where(inside, ((image * H + cy) * W + cx) * G + group, num_pixels)
        weight = (fy if corner // 2 else 1 - fy) * (fx if corner % 2 else 1 - fx) * modulation
        if not BINS:
            tl.store(pixel_ptr + at + corner, pixel, mask=real)
        tl.store(weight_ptr + at + corner, weight, mask=real)
    if BINS:
        near = (y >= -1) & (y < H) & (x >= -1) & (x < W)
        bin = ((image * G + group) * (H + 1) + y + 1) * (W + 1) + x + 1
        tl.store(pixel_ptr + sample, tl.where(near, bin, num_pixels), mask=real)


@triton.jit
def _find_corner(x_ptr, pixel_ptr, num_pixels, real, CG: tl.constexpr):
    """Give where the pixels of one corner lie, (BLOCK_R, 1), and whether they are on the map."""
    pixel = tl.load(pixel_ptr, mask=real, other=0)
    # In 64 bits: a map may be so large that a distance in elements needs them.
    return x_ptr + (pixel.to(tl.int64) * CG)[:, None], (real & (pixel < num_pixels))[:, None]


@triton.jit
def _load_weight(weight_ptr, real):
    """Load what one corner weighs: (BLOCK_R, 1)."""
    return tl.load(weight_ptr, mask=real, other=0.0)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_sample_fwd_kernel(
    x_ptr,  # (pixels, CG)
    pixel_ptr,  # (R, 4)
    weight_ptr,  # (R, 4)
    columns_ptr,  # (R, CG)
    num_pixels,
    num_samples,
    CG: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real, row = sample < num_samples, sample.to(tl.int64)
    pixel_ptr, weight_ptr, columns_ptr = pixel_ptr + row * 4, weight_ptr + row * 4, columns_ptr + (row * CG)[:, None]
    p0, inside0 = _find_corner(x_ptr, pixel_ptr, num_pixels, real, CG)
    p1, inside1 = _find_corner(x_ptr, pixel_ptr + 1, num_pixels, real, CG)
    p2, inside2 = _find_corner(x_ptr, pixel_ptr + 2, num_pixels, real, CG)
    p3, inside3 = _find_corner(x_ptr, pixel_ptr + 3, num_pixels, real, CG)
    w0, w1 = _load_weight(weight_ptr, real), _load_weight(weight_ptr + 1, real)
    w2, w3 = _load_weight(weight_ptr + 2, real), _load_weight(weight_ptr + 3, real)
    for first in tl.static_range(0, CG, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        used = channel < CG
        x0 = tl.load(p0 + channel, mask=inside0 & used, other=0.0).to(tl.float32)
        x1 = tl.load(p1 + channel, mask=inside1 & used, other=0.0).to(tl.float32)
        x2 = tl.load(p2 + channel, mask=inside2 & used, other=0.0).to(tl.float32)
        x3 = tl.load(p3 + channel, mask=inside3 & used, other=0.0).to(tl.float32)
        value = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        tl.store(columns_ptr + channel, value.to(columns_ptr.dtype.element_ty), mask=real[:, None] & used)


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_sample_bwd_kernel(
    dcolumns_ptr,  # (R, CG)
    x_ptr,  # (pixels, CG)
    pixel_ptr,  # (R, 4)
    weight_ptr,  # (R, 4)
    columns_ptr,  # (R, CG), written if COLUMNS
    dot_ptr,  # (R, 4) float32
    num_pixels,
    num_samples,
    CG: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiply the gradient of each sample with its four pixels; sample anew."""
    sample = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real, row = sample < num_samples, sample.to(tl.int64)
    pixel_ptr, weight_ptr, dot_ptr = pixel_ptr + row * 4, weight_ptr + row * 4, dot_ptr + row * 4
    p0, inside0 = _find_corner(x_ptr, pixel_ptr, num_pixels, real, CG)
    p1, inside1 = _find_corner(x_ptr, pixel_ptr + 1, num_pixels, real, CG)
    p2, inside2 = _find_corner(x_ptr, pixel_ptr + 2, num_pixels, real, CG)
    p3, inside3 = _find_corner(x_ptr, pixel_ptr + 3, num_pixels, real, CG)
    if COLUMNS:
        w0, w1 = _load_weight(weight_ptr, real), _load_weight(weight_ptr + 1, real)
        w2, w3 = _load_weight(weight_ptr + 2, real), _load_weight(weight_ptr + 3, real)
    d0, d1 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32), tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    d2, d3 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32), tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in tl.static_range(0, CG, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        used = channel < CG
        at = (row * CG)[:, None] + channel
        grad = tl.load(dcolumns_ptr + at, mask=real[:, None] & used, other=0.0).to(tl.float32)
        x0 = tl.load(p0 + channel, mask=inside0 & used, other=0.0).to(tl.float32)
        x1 = tl.load(p1 + channel, mask=inside1 & used, other=0.0).to(tl.float32)
        x2 = tl.load(p2 + channel, mask=inside2 & used, other=0.0).to(tl.float32)
        x3 = tl.load(p3 + channel, mask=inside3 & used, other=0.0).to(tl.float32)
        d0 += grad * x0
        d1 += grad * x1
        d2 += grad * x2
        d3 += grad * x3
        if COLUMNS:
            value = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
            tl.store(columns_ptr + at, value.to(columns_ptr.dtype.element_ty), mask=real[:, None] & used)
    tl.store(dot_ptr, tl.sum(d0, 1), mask=real)
    tl.store(dot_ptr + 1, tl.sum(d1, 1), mask=real)
    tl.store(dot_ptr + 2, tl.sum(d2, 1), mask=real)
    tl.store(dot_ptr + 3, tl.sum(d3, 1), mask=real)


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_place_grad_kernel(
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    dot_ptr,  # (R, 4) float32
    doffset_ptr,  # (B, G, K, 2, P)
    dmask_ptr,  # (B, G, K, P), written if MASKED
    num_samples,
    H,
    W,
    P,
    out_w,
    G: tl.constexpr,
    GEOMETRY: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Turn what the gradient says about four pixels into the gradients of the position and of the modulation."""
    sample = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    # fmt: off
    _, _, _, _, fy, fx, modulation, row, at = _locate(
        offset_ptr, mask_ptr, sample, num_samples, (H, W, P, out_w),
        G, GEOMETRY, MASKED)
    # fmt: on
    real = sample < num_samples
    dot_ptr += sample.to(tl.int64) * 4
    d0, d1 = tl.load(dot_ptr, mask=real, other=0.0), tl.load(dot_ptr + 1, mask=real, other=0.0)
    d2, d3 = tl.load(dot_ptr + 2, mask=real, other=0.0), tl.load(dot_ptr + 3, mask=real, other=0.0)
    dy = ((d2 - d0) * (1 - fx) + (d3 - d1) * fx) * modulation
    dx = ((d1 - d0) * (1 - fy) + (d3 - d2) * fy) * modulation
    tl.store(doffset_ptr + at + row, dy.to(doffset_ptr.dtype.element_ty), mask=real)
    tl.store(doffset_ptr + at + row + P, dx.to(doffset_ptr.dtype.element_ty), mask=real)
    if MASKED:
        dmodulation = (d0 * (1 - fx) + d1 * fx) * (1 - fy) + (d2 * (1 - fx) + d3 * fx) * fy
        tl.store(dmask_ptr + at, dmodulation.to(dmask_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_gather_kernel(
    dcolumns_ptr,  # (R, CG)
    order_ptr,  # (R,) int64, samples sorted by bin
    weight_ptr,  # (R, 4) float32
    start_ptr,  # (bins + 1,), where the samples of a bin start in ``order``
    dx_ptr,  # (B, H, W, G, CG)
    H,
    W,
    G: tl.constexpr,
    CG: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add to one pixel what the samples in the four bins around it say: it is their lower right corner, and so on."""
    # Two parts of the channels at a time share what a sample costs but once.
    TWO: tl.constexpr = CG > BLOCK_C
    parts: tl.constexpr = (CG + 2 * BLOCK_C - 1) // (2 * BLOCK_C)
    pixel, channel = tl.program_id(0) // parts, tl.program_id(0) % parts * (2 * BLOCK_C) + tl.arange(0, BLOCK_C)
    group, place = pixel % G, pixel // G
    image, y, x = place // (H * W), place // W % H, place % W
    # A row of bins is numbered from left to right: those whose right corner it is end where those of the left start.
    start_ptr += ((image * G + group) * (H + 1) + y) * (W + 1) + x
    above, above_mid, above_end = tl.load(start_ptr), tl.load(start_ptr + 1), tl.load(start_ptr + 2)
    start_ptr += W + 1
    below, below_mid, below_end = tl.load(start_ptr), tl.load(start_ptr + 1), tl.load(start_ptr + 2)
    count_above, count = above_end - above, above_end - above + below_end - below
    total = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    total_two = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        real, lower = j < count, j < count_above
        at = tl.where(lower, above, below - count_above) + j
        right = at < tl.where(lower, above_mid, below_mid)
        sample = tl.load(order_ptr + at, mask=real, other=0).to(tl.int32)
        corner = tl.where(lower, 2, 0) + tl.where(right, 1, 0)
        weight = tl.load(weight_ptr + (sample * 4 + corner), mask=real, other=0.0)[:, None]
        ptr = dcolumns_ptr + (sample.to(tl.int64) * CG)[:, None] + channel[None, :]
        grad = tl.load(ptr, mask=real[:, None] & (channel < CG)[None, :], other=0.0)
        total += grad.to(tl.float32) * weight
        if TWO:
            grad = tl.load(ptr + BLOCK_C, mask=real[:, None] & (channel + BLOCK_C < CG)[None, :], other=0.0)
            total_two += grad.to(tl.float32) * weight
    dx_ptr += pixel.to(tl.int64) * CG + channel
    tl.store(dx_ptr, tl.sum(total, 0).to(dx_ptr.dtype.element_ty), mask=channel < CG)
    if TWO:
        total = tl.sum(total_two, 0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + BLOCK_C, total, mask=channel + BLOCK_C < CG)


class _Call:
    """What the launchers of one call share: sizes, and the constants of the kernels that compute positions."""

    def __init__(self, offset: Tensor, mask: Tensor | None, batch: int, size: Sequence[int], geometry: tuple) -> None:
        self.taps, self.places = geometry[0][0] * geometry[0][1], offset.shape[2] * offset.shape[3]
        self.groups = offset.shape[1] // (2 * self.taps)
        self.num_pixels = batch * size[0] * size[1] * self.groups
        self.num_samples = batch * self.places * self.taps * self.groups
        assert max(self.num_pixels, 4 * self.num_samples) < 2**31, "pixels and corners are numbered in 32 bits"
        self.sizes = (*size, self.places, offset.shape[3])
        constants = tuple(value for pair in geometry for value in pair)
        self.rules = (self.groups, constants, mask is not None, 128)
        self.place_grid = (triton.cdiv(self.num_samples, 128),)
        self.offset, self.mask = offset, offset if mask is None else mask

    def locate(self, bins: int = 0) -> tuple[Tensor, Tensor]:
        """Return the four pixels of every sample, or its one of so many ``bins``, and what the pixels weigh."""
        shape = (self.num_samples,) if bins else (self.num_samples, 4)
        pixel = torch.empty(shape, dtype=torch.int32, device=self.offset.device)
        weight = torch.empty(self.num_samples, 4, dtype=torch.float32, device=self.offset.device)
        _deform_conv2d_locate_kernel[self.place_grid](
            self.offset,
            self.mask,
            pixel,
            weight,
            bins or self.num_pixels,
            self.num_samples,
            *self.sizes,
            *self.rules,
            bins > 0,
        )
        return pixel, weight

    def config(self, kernel: str, x: Tensor, num_warps: int) -> dict:
        default = Config(num_warps=num_warps, num_stages=1)
        channels = x.shape[-1] // self.groups
        return config_of(kernel, target_of(x.device).arch, x.dtype, self.taps, channels, default).options


def _blocks(channels: int, itemsize: int, elements: int) -> tuple[int, int]:
    """Rows and channels that a program has at a time: as many channels of a row as a cache line of 128 bytes holds.

    Eight lanes then move a row, and what they do but once a row is shared by the four rows of a warp.
    """
    block_c = min(128 // itemsize, triton.next_power_of_2(channels))
    return min(128, elements // block_c), block_c


def sample(x: Tensor, offset: Tensor, mask: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    """Return the columns (B, P, K, C) of a map (B, H, W, C).

    Offset and mask are contiguous and as in the op; the geometry is kernel size, stride, padding and dilation.
    """
    call = _Call(offset, mask, len(x), x.shape[1:3], geometry)
    columns = x.new_empty(len(x), call.places, call.taps, x.shape[3])
    channels = x.shape[3] // call.groups
    block_r, block_c = _blocks(channels, x.element_size(), 2048)
    _deform_conv2d_sample_fwd_kernel[(triton.cdiv(call.num_samples, block_r),)](
        x,
        *call.locate(),
        columns,
        call.num_pixels,
        call.num_samples,
        channels,
        block_r,
        block_c,
        **call.config("deform_conv2d_sample_fwd", x, num_warps=4),
    )
    return columns


def sample_gradients(
    dcolumns: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    *rest: Sequence[int] | bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the columns, if the last argument says so, and the gradients of offset and mask."""
    *geometry, needs_columns = rest
    call = _Call(offset, mask, len(x), x.shape[1:3], geometry)
    columns = torch.empty_like(dcolumns) if needs_columns else None
    dots = torch.empty(call.num_samples, 4, dtype=torch.float32, device=x.device)
    channels = x.shape[3] // call.groups
    block_r, block_c = _blocks(channels, x.element_size(), 1024)
    _deform_conv2d_sample_bwd_kernel[(triton.cdiv(call.num_samples, block_r),)](
        dcolumns,
        x,
        *call.locate(),
        dcolumns if columns is None else columns,
        dots,
        call.num_pixels,
        call.num_samples,
        channels,
        needs_columns,
        block_r,
        block_c,
        **call.config("deform_conv2d_sample_bwd", x, num_warps=4),
    )
    doffset, dmask = torch.empty_like(offset), None if mask is None else torch.empty_like(mask)
    _deform_conv2d_place_grad_kernel[call.place_grid](
        offset,
        call.mask,
        dots,
        doffset,
        doffset if dmask is None else dmask,
        call.num_samples,
        *call.sizes,
        *call.rules,
    )
    return columns, doffset, dmask


def input_gradient(
    dcolumns: Tensor, size: Sequence[int], offset: Tensor, mask: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    """Return the gradient of the map, (B, H, W, C)."""
    call = _Call(offset, mask, len(dcolumns), size, geometry)
    dx = dcolumns.new_empty(len(dcolumns), *size, dcolumns.shape[3])
    channels = dx.shape[3] // call.groups
    num_bins = len(dx) * call.groups * (size[0] + 1) * (size[1] + 1)
    assert num_bins < 2**31, "bins are numbered in 32 bits"
    sample_bin, weight = call.locate(num_bins)
    ordered, order = sample_bin.sort(stable=True)
    bins = torch.arange(num_bins + 1, dtype=torch.int32, device=dx.device)
    start = torch.searchsorted(ordered, bins, out_int32=True)
    block_c = min(128, triton.next_power_of_2(channels))
    _deform_conv2d_gather_kernel[(call.num_pixels * triton.cdiv(channels, 2 * block_c),)](
        dcolumns,
        order,
        weight,
        start,
        dx,
        *size,
        call.groups,
        channels,
        min(32, 1024 // block_c),
        block_c,
        **call.config("deform_conv2d_gather", dx, num_warps=1),
    )
    return dx
