"""The samples of a deformable convolution: columns for the product, and the gradients through them, without atomics.

A *sample* is one tap of one output place, for one offset group: four pixels of the map, weighed by how near they lie
and by the mask. ``sample`` writes the columns that the library multiplies with the weight; ``sample_gradients`` gives
the gradients of offset and mask from those of the columns, and samples anew in the same pass; ``input_gradient`` sorts
the corners by the pixel on which they lie, and then each pixel gathers what belongs to it, in the order of the samples.

Bytes of a sample of CG channels, at s bytes an element, beside the map itself: columns s CG out; gradients s CG in, and
s CG out where the columns are wanted; input s CG in, read once for each of four corners, mostly from the cache, and
16 + 16 bytes of keys and weights, which are sorted. Positions, weights and sums are float32.

Compiled for sm_80 and sm_90 at CG = 256 in 16 bits it must show 16-byte loads and stores of the channels and no stack.

Letters: B batch · H W map height and width · C channels · G offset groups · CG channels of one · K taps, kh times kw ·
P places of the output map · R samples, B P K G.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.targets import target_of

SIZES = ["H", "W", "P", "out_w"]
"""Arguments whose divisibility tells the compiler nothing: a new map must not compile again."""


@triton.jit
def _part(position, LAST):
    """Whole and fractional part of a position, at most one pixel off the map; NaN stays in the fraction."""
    clamped = tl.minimum(tl.maximum(position, -1.0), LAST.to(tl.float32))
    clamped = tl.where(position == position, clamped, -1.0)
    whole = tl.floor(clamped)
    return whole.to(tl.int32), tl.where(position == position, clamped - whole, position)


@triton.jit
def _locate(
    offset_ptr,  # (2*K, P) of this image and group
    mask_ptr,  # (K, P) of this image and group; read if MASKED
    sample,
    H,
    W,
    P,
    out_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Give, for samples (R,) numbered place by place, the upper left pixel, the fractions, and the modulation."""
    real = sample < P * KH * KW
    place, tap = sample // (KH * KW), sample % (KH * KW)
    at = tap * P + place
    dy = tl.load(offset_ptr + at + tap * P, mask=real, other=0.0).to(tl.float32)
    dx = tl.load(offset_ptr + at + tap * P + P, mask=real, other=0.0).to(tl.float32)
    modulation = tl.full(sample.shape, 1.0, tl.float32)
    if MASKED:
        modulation = tl.load(mask_ptr + at, mask=real, other=0.0).to(tl.float32)
    y = (place // out_w * STRIDE_H - PAD_H + tap // KW * DILATION_H).to(tl.float32) + dy
    x = (place % out_w * STRIDE_W - PAD_W + tap % KW * DILATION_W).to(tl.float32) + dx
    y, fy = _part(y, H)
    x, fx = _part(x, W)
    return real, y, x, fy, fx, modulation


@triton.jit
def _load_corner(x_ptr, y, x, H, W, real, channel, STEP: tl.constexpr, CG: tl.constexpr):
    """Load pixels (R,) of a map, zeros off it: (R, BLOCK_C) in float32."""
    inside = real & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    # In 64 bits: a map may be so large that a distance in elements needs them.
    pixel = (y * W + x).to(tl.int64) * STEP
    ptr = x_ptr + pixel[:, None] + channel[None, :]
    return tl.load(ptr, mask=inside[:, None] & (channel < CG)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_sample_fwd_kernel(
    x_ptr,  # (B, H, W, G, CG)
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    columns_ptr,  # (B, P, K, G, CG)
    H,
    W,
    P,
    out_w,
    G: tl.constexpr,
    CG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    K: tl.constexpr = KH * KW
    blocks = tl.cdiv(P * K, BLOCK_R)
    image_group = (tl.program_id(0) // blocks).to(tl.int64)
    image, group = image_group // G, image_group % G
    sample = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    offset_ptr, mask_ptr = offset_ptr + image_group * (2 * K * P), mask_ptr + image_group * (K * P)
    # fmt: off
    real, y, x, fy, fx, modulation = _locate(
        offset_ptr, mask_ptr, sample, H, W, P, out_w,
        KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, MASKED)
    # fmt: on
    x_ptr += image * H * W * (G * CG) + group * CG
    top, bottom = (1 - fy) * modulation, fy * modulation
    row = (image * (P * K) + sample) * (G * CG) + group * CG
    for first in tl.static_range(0, CG, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        value = _load_corner(x_ptr, y, x, H, W, real, channel, G * CG, CG) * (top * (1 - fx))[:, None]
        value += _load_corner(x_ptr, y, x + 1, H, W, real, channel, G * CG, CG) * (top * fx)[:, None]
        value += _load_corner(x_ptr, y + 1, x, H, W, real, channel, G * CG, CG) * (bottom * (1 - fx))[:, None]
        value += _load_corner(x_ptr, y + 1, x + 1, H, W, real, channel, G * CG, CG) * (bottom * fx)[:, None]
        ptr = columns_ptr + row[:, None] + channel[None, :]
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=real[:, None] & (channel < CG)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _deform_conv2d_sample_bwd_kernel(
    dcolumns_ptr,  # (B, P, K, G, CG)
    x_ptr,  # (B, H, W, G, CG)
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    columns_ptr,  # (B, P, K, G, CG), written if COLUMNS
    doffset_ptr,  # (B, G, K, 2, P)
    dmask_ptr,  # (B, G, K, P), written if MASKED
    H,
    W,
    P,
    out_w,
    G: tl.constexpr,
    CG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    K: tl.constexpr = KH * KW
    blocks = tl.cdiv(P * K, BLOCK_R)
    image_group = (tl.program_id(0) // blocks).to(tl.int64)
    image, group = image_group // G, image_group % G
    sample = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    offset_ptr, mask_ptr = offset_ptr + image_group * (2 * K * P), mask_ptr + image_group * (K * P)
    # fmt: off
    real, y, x, fy, fx, modulation = _locate(
        offset_ptr, mask_ptr, sample, H, W, P, out_w,
        KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, MASKED)
    # fmt: on
    x_ptr += image * H * W * (G * CG) + group * CG
    row = (image * (P * K) + sample) * (G * CG) + group * CG
    # What the gradient of a sample says about each of its four pixels.
    d00, d01 = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    d10, d11 = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for first in tl.static_range(0, CG, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        at, used = row[:, None] + channel[None, :], real[:, None] & (channel < CG)[None, :]
        grad = tl.load(dcolumns_ptr + at, mask=used, other=0.0).to(tl.float32)
        pixel = _load_corner(x_ptr, y, x, H, W, real, channel, G * CG, CG)
        value = pixel * ((1 - fy) * (1 - fx) * modulation)[:, None]
        d00 += tl.sum(grad * pixel, 1)
        pixel = _load_corner(x_ptr, y, x + 1, H, W, real, channel, G * CG, CG)
        value += pixel * ((1 - fy) * fx * modulation)[:, None]
        d01 += tl.sum(grad * pixel, 1)
        pixel = _load_corner(x_ptr, y + 1, x, H, W, real, channel, G * CG, CG)
        value += pixel * (fy * (1 - fx) * modulation)[:, None]
        d10 += tl.sum(grad * pixel, 1)
        pixel = _load_corner(x_ptr, y + 1, x + 1, H, W, real, channel, G * CG, CG)
        value += pixel * (fy * fx * modulation)[:, None]
        d11 += tl.sum(grad * pixel, 1)
        if COLUMNS:
            tl.store(columns_ptr + at, value.to(columns_ptr.dtype.element_ty), mask=used)
    place, tap = sample // K, sample % K
    at = tap * P + place
    dy = ((d10 - d00) * (1 - fx) + (d11 - d01) * fx) * modulation
    dx = ((d01 - d00) * (1 - fy) + (d11 - d10) * fy) * modulation
    doffset_ptr += image_group * (2 * K * P)
    tl.store(doffset_ptr + at + tap * P, dy.to(doffset_ptr.dtype.element_ty), mask=real)
    tl.store(doffset_ptr + at + tap * P + P, dx.to(doffset_ptr.dtype.element_ty), mask=real)
    if MASKED:
        dmodulation = (d00 * (1 - fx) + d01 * fx) * (1 - fy) + (d10 * (1 - fx) + d11 * fx) * fy
        dmask_ptr += image_group * (K * P)
        tl.store(dmask_ptr + at, dmodulation.to(dmask_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=[*SIZES, "num_pixels"])
def _deform_conv2d_corners_kernel(
    offset_ptr,  # (B, G, K, 2, P)
    mask_ptr,  # (B, G, K, P), read if MASKED
    pixel_ptr,  # (R, 4) int32, samples numbered (B, P, K, G), pixels (B, H, W, G); num_pixels where off the map
    weight_ptr,  # (R, 4) float32
    num_pixels,
    H,
    W,
    P,
    out_w,
    G: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    K: tl.constexpr = KH * KW
    blocks = tl.cdiv(P * K, BLOCK_R)
    image_group = (tl.program_id(0) // blocks).to(tl.int64)
    image, group = image_group // G, image_group % G
    sample = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    offset_ptr, mask_ptr = offset_ptr + image_group * (2 * K * P), mask_ptr + image_group * (K * P)
    # fmt: off
    real, y, x, fy, fx, modulation = _locate(
        offset_ptr, mask_ptr, sample, H, W, P, out_w,
        KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, MASKED)
    # fmt: on
    at = ((image * (P * K) + sample) * G + group) * 4
    for corner in tl.static_range(4):
        cy, cx = y + corner // 2, x + corner % 2
        inside = (cy >= 0) & (cy < H) & (cx >= 0) & (cx < W)
        pixel = ((image.to(tl.int32) * H + cy) * W + cx) * G + group.to(tl.int32)
        weight = (fy if corner // 2 else 1 - fy) * (fx if corner % 2 else 1 - fx) * modulation
        tl.store(pixel_ptr + at + corner, tl.where(inside, pixel, num_pixels), mask=real)
        tl.store(weight_ptr + at + corner, weight, mask=real)


@triton.jit
def _deform_conv2d_gather_kernel(
    dcolumns_ptr,  # (R, CG)
    order_ptr,  # (R*4,) int64, corners sorted by pixel
    weight_ptr,  # (R*4,) float32
    start_ptr,  # (pixels + 1,), where the corners of a pixel start in ``order``
    dx_ptr,  # (pixels, CG)
    CG: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunks: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    pixel = tl.program_id(0) // chunks
    channel = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    used = channel < CG
    start, stop = tl.load(start_ptr + pixel), tl.load(start_ptr + pixel + 1)
    total = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        corner = tl.load(order_ptr + j, mask=j < stop, other=0)
        weight = tl.load(weight_ptr + corner, mask=j < stop, other=0.0)
        ptr = dcolumns_ptr + ((corner >> 2) * CG)[:, None] + channel[None, :]
        grad = tl.load(ptr, mask=(j < stop)[:, None] & used[None, :], other=0.0)
        total += grad.to(tl.float32) * weight[:, None]
    dx_ptr += pixel.to(tl.int64) * CG + channel
    tl.store(dx_ptr, tl.sum(total, 0).to(dx_ptr.dtype.element_ty), mask=used)


def _config(name: str, x: Tensor, taps: int, channels: int, default: Config) -> Config:
    return config_of(name, target_of(x.device).arch, x.dtype, taps, channels, default)


def _rules(kernel_size: Sequence[int], *rest: Sequence[int]) -> tuple[int, ...]:
    """Constants KH to DILATION_W of every kernel."""
    return (*kernel_size, *(value for pair in rest for value in pair))


def _blocks(channels: int, elements: int) -> tuple[int, int]:
    """Samples and channels that a program has at a time: whole rows of up to 256 channels."""
    block_c = min(256, triton.next_power_of_2(channels))
    return max(1, elements // block_c), block_c


def sample(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the columns (B, P, K, C) of a map (B, H, W, C); offset and mask are contiguous and as in the op."""
    batch, height, width, channels = x.shape
    taps, places = kernel_size[0] * kernel_size[1], offset.shape[2] * offset.shape[3]
    groups = offset.shape[1] // (2 * taps)
    block_r, block_c = _blocks(channels // groups, 4096)
    columns = x.new_empty(batch, places, taps, channels)
    config = _config("deform_conv2d_sample_fwd", x, taps, channels // groups, Config(num_warps=4, num_stages=1))
    _deform_conv2d_sample_fwd_kernel[(batch * groups * triton.cdiv(places * taps, block_r),)](
        x,
        offset,
        offset if mask is None else mask,
        columns,
        height,
        width,
        places,
        offset.shape[3],
        groups,
        channels // groups,
        *_rules(kernel_size, stride, padding, dilation),
        mask is not None,
        block_r,
        block_c,
        **config.options,
    )
    return columns


def sample_gradients(
    dcolumns: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_columns: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the columns, if they are wanted, and the gradients of offset and mask."""
    batch, height, width, channels = x.shape
    taps, places = kernel_size[0] * kernel_size[1], offset.shape[2] * offset.shape[3]
    groups = offset.shape[1] // (2 * taps)
    block_r, block_c = _blocks(channels // groups, 4096)
    columns = torch.empty_like(dcolumns) if needs_columns else None
    doffset, dmask = torch.empty_like(offset), None if mask is None else torch.empty_like(mask)
    config = _config("deform_conv2d_sample_bwd", x, taps, channels // groups, Config(num_warps=4, num_stages=1))
    _deform_conv2d_sample_bwd_kernel[(batch * groups * triton.cdiv(places * taps, block_r),)](
        dcolumns,
        x,
        offset,
        offset if mask is None else mask,
        dcolumns if columns is None else columns,
        doffset,
        doffset if dmask is None else dmask,
        height,
        width,
        places,
        offset.shape[3],
        groups,
        channels // groups,
        *_rules(kernel_size, stride, padding, dilation),
        mask is not None,
        needs_columns,
        block_r,
        block_c,
        **config.options,
    )
    return columns, doffset, dmask


def input_gradient(
    dcolumns: Tensor,
    size: Sequence[int],
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of the map, (B, H, W, C): the same bits in every run, whatever the offsets are."""
    batch, places, taps, channels = dcolumns.shape
    groups = offset.shape[1] // (2 * taps)
    num_pixels, num_corners = batch * size[0] * size[1] * groups, batch * places * taps * groups * 4
    assert max(num_pixels, num_corners) < 2**31, "pixels and corners are numbered in 32 bits"
    pixel = torch.empty(num_corners, dtype=torch.int32, device=offset.device)
    weight = torch.empty(num_corners, dtype=torch.float32, device=offset.device)
    block_r = 128
    _deform_conv2d_corners_kernel[(batch * groups * triton.cdiv(places * taps, block_r),)](
        offset,
        offset if mask is None else mask,
        pixel,
        weight,
        num_pixels,
        *size,
        places,
        offset.shape[3],
        groups,
        *_rules(kernel_size, stride, padding, dilation),
        mask is not None,
        block_r,
    )
    ordered, order = pixel.sort(stable=True)
    pixels = torch.arange(num_pixels + 1, dtype=torch.int32, device=offset.device)
    start = torch.searchsorted(ordered, pixels, out_int32=True)
    dx = dcolumns.new_empty(batch, *size, channels)
    block_j, block_c = _blocks(channels // groups, 2048)
    block_j = min(block_j, 32)
    config = _config("deform_conv2d_gather", dx, taps, channels // groups, Config(num_warps=1, num_stages=1))
    chunks = triton.cdiv(channels // groups, block_c)
    _deform_conv2d_gather_kernel[(num_pixels * chunks,)](
        dcolumns, order, weight, start, dx, channels // groups, block_j, block_c, **config.options
    )
    return dx
