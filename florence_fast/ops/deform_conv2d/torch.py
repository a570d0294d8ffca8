"""The products of a deformable convolution, and its samples by library calls: the ``torch`` backend.

The ``triton`` backend brings samples of its own and shares the products. Columns are computed for a few images at a
time, so that their memory is bounded; they are not kept for the backward, which samples anew.

Every sum has an order that depends on sizes alone. A pixel's gradient is a sum over the samples that touch it: the
corners of all samples are sorted by their pixel, stably, and each pixel adds its own. That costs a sort of 4 keys a
sample, where adding to memory in the order of arrival would give other bits in every run.

Letters: B batch · H W map height and width · C channels · G offset groups · K taps, kh times kw · P places of the
output map · R samples, B P K G.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops._product import linear

COLUMN_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""How many bytes of columns exist at a time, if one image does not need more."""


class Samples(NamedTuple):
    """Where the samples lie. Corners are ordered upper left, upper right, lower left, lower right."""

    pixel: Tensor
    """(R, 4), numbered (B, H, W, G); one past the last where a corner is off the map."""
    nearness: Tensor
    """(R, 4), what each corner weighs, before the mask."""
    fy: Tensor
    fx: Tensor
    modulation: Tensor
    """(R,)"""


def deform_conv2d_fwd(
    sampler: ModuleType | type,
    dtype: torch.dtype,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Return the result (B, Cout, Hout, Wout); samples and products are computed in ``dtype``."""
    geometry = (list(weight.shape[2:]), stride, padding, dilation)
    matrix, groups = _matrix(weight.to(dtype), input.shape[1]), input.shape[1] // weight.shape[1]
    out = input.new_empty(len(input), len(weight), *offset.shape[2:])
    for images in _slices(input, offset, weight, dtype):
        columns = sampler.sample(_channels_last(input[images], dtype), *_taps(offset, mask, images), *geometry)
        product = _product(matrix, _by_group(columns, groups))
        if bias is not None:
            product += bias.view(groups, -1, 1)
        out[images] = product.view_as(out[images])
    return out


def deform_conv2d_bwd(
    sampler: ModuleType | type,
    dtype: torch.dtype,
    grad_out: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, offset, mask, weight and bias, None where ``needs`` is false."""
    needs_input, needs_offset, needs_mask, needs_weight, needs_bias = needs
    geometry = (list(weight.shape[2:]), stride, padding, dilation)
    matrix, groups = _matrix(weight.to(dtype), input.shape[1]), input.shape[1] // weight.shape[1]
    wanted: tuple[tuple[Any, bool], ...] = ((input, needs_input), (offset, needs_offset), (mask, needs_mask))
    dinput: Any
    dinput, doffset, dmask = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in wanted
    )
    wide = torch.promote_types(input.dtype, torch.float32)
    dmatrix = torch.zeros_like(matrix, dtype=wide)
    columns: Any = None
    dcolumns: Any = None
    for images in _slices(input, offset, weight, dtype) if any(needs[:4]) else ():
        x, taps = _channels_last(input[images], dtype), _taps(offset, mask, images)
        grad = grad_out[images].to(dtype).flatten(2).unflatten(1, (groups, -1))
        if needs_input or needs_offset or needs_mask:
            dcolumns = _to_columns(_product(grad.mT, matrix.mT), geometry[0])
        if needs_offset or needs_mask:
            columns, *grads = sampler.sample_gradients(dcolumns, x, *taps, *geometry, needs_weight)
            for whole, part in zip((doffset, dmask), grads, strict=True):
                if whole is not None:
                    whole[images] = part.view_as(whole[images])
        elif needs_weight:
            columns = sampler.sample(x, *taps, *geometry)
        if needs_weight:
            by_group = _by_group(columns, groups).transpose(0, 1).flatten(1, 2)
            dmatrix += _product(grad.permute(1, 2, 0, 3).flatten(2), by_group.mT)
        if needs_input:
            dinput[images] = sampler.input_gradient(dcolumns, input.shape[2:], *taps, *geometry).permute(0, 3, 1, 2)
    dbias = grad_out.sum((0, 2, 3), dtype=wide).to(bias.dtype) if needs_bias and bias is not None else None
    return dinput, doffset, dmask, _from_matrix(dmatrix, weight) if needs_weight else None, dbias


def _slices(input: Tensor, offset: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Walk over the batch: which images to work on at a time."""
    taps, places = weight.shape[2] * weight.shape[3], offset.shape[2] * offset.shape[3]
    limit = COLUMN_BYTES["cpu" if input.device.type == "cpu" else "cuda"]
    step = max(1, limit // (places * taps * input.shape[1] * dtype.itemsize))
    for start in range(0, len(input), step):
        yield slice(start, min(start + step, len(input)))


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _taps(offset: Tensor, mask: Tensor | None, images: slice) -> tuple[Tensor, Tensor | None]:
    return offset[images].contiguous(), None if mask is None else mask[images].contiguous()


def _matrix(weight: Tensor, channels: int) -> Tensor:
    """Lay the weight out as the columns lie: (groups, Cout/groups, K*Cin/groups)."""
    groups = channels // weight.shape[1]
    return weight.flatten(2).mT.reshape(groups, len(weight) // groups, -1)


def _from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """Undo ``_matrix``."""
    taps = weight.shape[2] * weight.shape[3]
    return matrix.view(len(weight), taps, -1).mT.reshape(weight.shape).to(weight.dtype).contiguous()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T over any leading dimensions, of which the third from the end counts groups."""
    if x.device.type != "cpu" or x.shape[-3] != 1:
        return x @ weight.mT
    x, weight = x.squeeze(-3), weight.squeeze(-3)
    if weight.ndim == 2:
        return linear(x, weight).unsqueeze(-3)
    return torch.stack([linear(x, one) for one in weight]).unsqueeze(-3)


def _by_group(columns: Tensor, groups: int) -> Tensor:
    """Bring the groups of the weight before the places: (B, P, K, C) to (B, groups, P, K*C/groups)."""
    if groups == 1:
        return columns.flatten(2)[:, None]
    return columns.unflatten(3, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(3)


def _to_columns(by_group: Tensor, kernel_size: list[int]) -> Tensor:
    """Undo ``_by_group``; the result is contiguous."""
    batch, groups, places, _ = by_group.shape
    parts = by_group.view(batch, groups, places, kernel_size[0] * kernel_size[1], -1)
    return parts.permute(0, 2, 3, 1, 4).flatten(3).contiguous()


class LibrarySampler:
    """Samples by calls of the library, in float32 or float64."""

    @staticmethod
    def sample(x: Tensor, offset: Tensor, mask: Tensor | None, *geometry: list[int]) -> Tensor:
        """Return the columns (B, P, K, C) of a map (B, H, W, C)."""
        samples, table = _locate(x, offset, mask, *geometry), _table(x, offset, geometry[0])
        return _columns(samples, table, x, geometry[0])

    @staticmethod
    def sample_gradients(
        dcolumns: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the columns, if the last argument says so, and the gradients of offset and mask."""
        *geometry, needs_columns = rest
        samples, table = _locate(x, offset, mask, *geometry), _table(x, offset, geometry[0])
        grad = dcolumns.view(len(samples.pixel), -1)
        # What the gradient of a sample says about each of its four pixels.
        dots = [torch.linalg.vecdot(grad, table.index_select(0, pixel)) for pixel in samples.pixel.unbind(1)]
        d00, d01, d10, d11 = dots
        dy = torch.lerp(d10 - d00, d11 - d01, samples.fx) * samples.modulation
        dx = torch.lerp(d01 - d00, d11 - d10, samples.fy) * samples.modulation
        batch, places, taps, _ = dcolumns.shape
        doffset = torch.stack((dy, dx), -1).view(batch, places, taps, -1, 2).permute(0, 3, 2, 4, 1)
        dmask = None
        if mask is not None:
            dmask = (torch.stack(dots, 1) * samples.nearness).sum(1).view(batch, places, taps, -1).permute(0, 3, 2, 1)
            dmask = dmask.reshape(mask.shape).to(mask.dtype)
        columns = _columns(samples, table, x, geometry[0]) if needs_columns else None
        return columns, doffset.reshape(offset.shape).to(offset.dtype), dmask

    @staticmethod
    def input_gradient(
        dcolumns: Tensor, size: Sequence[int], offset: Tensor, mask: Tensor | None, *geometry: list[int]
    ) -> Tensor:
        """Return the gradient of the map, (B, H, W, C)."""
        batch, places, taps, channels = dcolumns.shape
        shape = (batch, *size, channels)
        samples = _locate(dcolumns.new_empty(0).expand(*shape[:3], 0), offset, mask, *geometry)
        groups = len(samples.pixel) // (batch * places * taps)
        ordered, order = samples.pixel.flatten().sort(stable=True)
        # The last bag is what lies off the map.
        pixels = torch.arange(batch * size[0] * size[1] * groups + 1, device=order.device)
        weight = (samples.nearness * samples.modulation[:, None]).flatten().index_select(0, order)
        rows = dcolumns.view(len(samples.pixel), -1)
        start = torch.searchsorted(ordered, pixels)
        return F.embedding_bag(order // 4, rows, start, mode="sum", per_sample_weights=weight)[:-1].reshape(shape)


def _table(x: Tensor, offset: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Return the pixels (B H W G, C/G) as rows, and a row of zeros for what is off the map."""
    groups = offset.shape[1] // (2 * kernel_size[0] * kernel_size[1])
    return F.pad(x.reshape(-1, x.shape[-1] // groups), (0, 0, 0, 1))


def _columns(samples: Samples, table: Tensor, x: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Add the four corners of each sample: (B, P, K, C)."""
    weight = samples.nearness * samples.modulation[:, None]
    columns = F.embedding_bag(samples.pixel, table, mode="sum", per_sample_weights=weight)
    return columns.view(len(x), -1, kernel_size[0] * kernel_size[1], x.shape[-1])


def _locate(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Samples:
    """Say where the samples lie, numbered (B, P, K, G), on a map (B, H, W, ...)."""
    batch, height, width = x.shape[:3]
    taps, dtype = kernel_size[0] * kernel_size[1], x.dtype
    moved = offset.reshape(batch, -1, taps, 2, offset.shape[2] * offset.shape[3]).permute(0, 4, 2, 1, 3).to(dtype)
    groups, parts = moved.shape[3], []
    for axis, size in enumerate((height, width)):
        place = torch.arange(offset.shape[2 + axis], device=x.device) * stride[axis] - padding[axis]
        tap = torch.arange(kernel_size[axis], device=x.device) * dilation[axis]
        grid = place[:, None] + tap
        grid = grid[:, None, :, None] if axis == 0 else grid[None, :, None, :]
        grid = grid.expand(*offset.shape[2:], *kernel_size).reshape(-1, taps, 1)
        position = (moved[..., axis] + grid).clamp(-2, size).flatten()
        whole = position.floor()
        # NaN has no whole part; it stays in the fraction, and so in the result.
        parts.append((whole.nan_to_num(-2).long(), position - whole))
    (y, fy), (x0, fx) = parts
    image = torch.arange(batch, device=x.device).repeat_interleave(len(y) // max(batch, 1))
    group = torch.arange(groups, device=x.device).repeat(len(y) // groups)
    pixel, nearness = [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = y + down, x0 + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        number = ((image * height + row) * width + column) * groups + group
        pixel.append(torch.where(inside, number, batch * height * width * groups))
        nearness.append((fy if down else 1 - fy) * (fx if right else 1 - fx))
    modulation = torch.ones_like(fy)
    if mask is not None:
        modulation = mask.reshape(batch, groups, taps, -1).permute(0, 3, 2, 1).to(dtype).flatten()
    return Samples(torch.stack(pixel, 1), torch.stack(nearness, 1), fy, fx, modulation)
