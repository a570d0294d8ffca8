"""The samples of a deformable convolution by native kernels: the ``cpp`` backend; its products are the ``torch`` one's.

Letters: B batch · H W map height and width · C channels · G offset groups · K taps, kh times kw · P places of the
output map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from florence_fast import native


def sample(x: Tensor, offset: Tensor, mask: Tensor | None, *geometry: list[int]) -> Tensor:
    """Return the columns (B, P, K, C) of a map (B, H, W, C), in its dtype."""
    columns = x.new_empty(_columns_shape(x, offset, geometry[0]))
    native.call("deform_conv2d_fwd", x.dtype, _geometry(x.shape, offset, *geometry), x, *_float(offset, mask), columns)
    return columns


def sample_gradients(
    dcolumns: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the columns, if the last argument says so, and the gradients of offset and mask."""
    *geometry, needs_columns = rest
    doffset = torch.empty_like(offset, dtype=torch.float32)
    dmask = None if mask is None else torch.empty_like(mask, dtype=torch.float32)
    columns = torch.empty_like(dcolumns) if needs_columns else None
    sizes = _geometry(x.shape, offset, *geometry)
    tensors = (dcolumns, x, *_float(offset, mask), doffset, dmask, columns)
    native.call("deform_conv2d_bwd", x.dtype, sizes, *tensors)
    return columns, doffset.to(offset.dtype), None if dmask is None or mask is None else dmask.to(mask.dtype)


def input_gradient(
    dcolumns: Tensor, size: Sequence[int], offset: Tensor, mask: Tensor | None, *geometry: list[int]
) -> Tensor:
    """Return the gradient of the map, (B, H, W, C) in float32, each sum in the order of the samples."""
    batch, _, _, channels = dcolumns.shape
    dinput = dcolumns.new_empty(batch, *size, channels, dtype=torch.float32)
    sizes = _geometry(dinput.shape, offset, *geometry)
    native.call("deform_conv2d_input_bwd", dcolumns.dtype, sizes, dcolumns, *_float(offset, mask), dinput)
    return dinput


def _columns_shape(x: Tensor, offset: Tensor, kernel_size: Sequence[int]) -> tuple[int, ...]:
    return len(x), offset.shape[2] * offset.shape[3], kernel_size[0] * kernel_size[1], x.shape[3]


def _float(offset: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions are computed in float32, whatever the dtype of the map."""
    return offset.float().contiguous(), None if mask is None else mask.float().contiguous()


def _geometry(
    map_shape: Sequence[int],
    offset: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Write the sizes into memory in the order of the kernels' struct."""
    groups = offset.shape[1] // (2 * kernel_size[0] * kernel_size[1])
    sizes = [*map_shape, groups, *kernel_size, *stride, *padding, *dilation, *offset.shape[2:]]
    return torch.tensor(sizes, dtype=torch.int64, device="cpu")
