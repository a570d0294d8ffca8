"""Convolution whose taps are moved by offsets and weighed by a mask: the spatial attention of Dynamic Head.

Florence detects with Dynamic Head (arXiv 2111.11432, section 2.4; Dynamic Head, 2106.08322, section 3.2); the
operation is Deformable ConvNets' (1703.06211), modulated in version 2 (1811.11168). Arguments are torchvision's.

Letters: B batch · H W map height and width · Hout Wout those of the result · G offset groups · K taps, kh times kw.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch
from florence_fast.ops.deform_conv2d import torch as torch_backend
from florence_fast.ops.spec import Op


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve a map, sampled where the offsets say.

    ``out(p) = sum_k weight_k * mask_k(p) * input(p * stride - padding + k * dilation + offset_k(p))``, the map read
    by bilinear interpolation and as zero beyond its border (1811.11168, equation 1). How many groups the weight and
    the offsets have follows from the shapes.

    Args:
        input: (B, Cin, H, W), floating.
        offset: (B, 2*G*kh*kw, Hout, Wout), in pixels, ordered (G, kh, kw, (y, x)); of any floating dtype.
        weight: (Cout, Cin/groups, kh, kw), the dtype of ``input``.
        bias: (Cout,), the dtype of ``input``.
        stride: pixels between places, (y, x) or one for both.
        padding: zeros around the map, (y, x) or one for both.
        dilation: pixels between taps, (y, x) or one for both.
        mask: (B, G*kh*kw, Hout, Wout), ordered (G, kh, kw); of any floating dtype. None: ones.

    Returns:
        (B, Cout, Hout, Wout) in the dtype of ``input``; under autocast, which casts input, weight and bias but
        neither offset nor mask, in autocast's, unless it is float64.

    Raises:
        TypeError: an argument is no tensor, not floating, or not of the dtype of ``input``.
        ValueError: a shape or a size is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    Positions and interpolation are computed in float32, or float64 for a float64 input. An empty batch gives an empty
    result. The gradients have the same bits in every run. Second derivatives are the reference's.

    >>> x, weight = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3)
    >>> deform_conv2d(x, torch.zeros(2, 18, 9, 9), weight, padding=1, mask=torch.ones(2, 9, 9, 9)).shape
    torch.Size([2, 16, 9, 9])
    """
    if isinstance(input, Tensor):
        given: tuple[Any, ...] = (input, weight, bias)
        input, weight, bias = (
            dispatch.autocast_input(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given
        )
    stride, padding, dilation = _check_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
    backend = dispatch.choose("deform_conv2d", *arguments)
    if backend == "reference":
        return deform_conv2d_reference(*arguments)
    return _deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, backend)


def _check_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
) -> tuple[list[int], list[int], list[int]]:
    """Raise what is wrong with the arguments; return stride, padding and dilation as pairs."""
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    for name, x in tensors.items():
        if x is None and name in ("bias", "mask"):
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if name in ("weight", "bias") and x.dtype != input.dtype:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {x.dtype}")
        if x.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}, got {x.device}")
    pairs = [_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)]
    if input.ndim != 4 or any(side == 0 for side in input.shape[1:]):
        raise ValueError(f"input must have shape (B, Cin, H, W), none but B zero, got {tuple(input.shape)}")
    if weight.ndim != 4 or any(side == 0 for side in weight.shape):
        raise ValueError(f"weight must have shape (Cout, Cin/groups, kh, kw), none zero, got {tuple(weight.shape)}")
    channels, taps = input.shape[1], weight.shape[2] * weight.shape[3]
    if channels % weight.shape[1] or weight.shape[0] % (channels // weight.shape[1]):
        raise ValueError(
            f"weight must have shape (Cout, Cin/groups, kh, kw) with Cin={channels} and Cout divisible by the number "
            f"of groups, got {tuple(weight.shape)}"
        )
    size = [
        (side + 2 * p - (d * (k - 1) + 1)) // s + 1
        for side, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *pairs, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(f"the map must hold the kernel at least once, got {tuple(input.shape)} and a result of {size}")
    if offset.ndim != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(f"offset must have shape (B, {2 * taps}*groups, Hout, Wout), got {tuple(offset.shape)}")
    groups = offset.shape[1] // (2 * taps)
    if channels % groups:
        raise ValueError(f"offset has {groups} groups, which must divide Cin={channels}")
    _check_shape("offset", offset, (input.shape[0], 2 * groups * taps, *size))
    _check_shape("mask", mask, (input.shape[0], groups * taps, *size))
    _check_shape("bias", bias, (weight.shape[0],))
    return pairs[0], pairs[1], pairs[2]


def _pair(name: str, value: Any, least: int) -> list[int]:
    values = [value] * 2 if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be one int or two of them, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return list(values)


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Define ``deform_conv2d`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    stride, padding, dilation = ([v] * 2 if isinstance(v, int) else v for v in (stride, padding, dilation))
    (batch, channels, height, width), kernel, out = input.shape, weight.shape[2:], offset.shape[2:]
    taps, dtype = kernel[0] * kernel[1], torch.promote_types(input.dtype, torch.float32)
    groups, places, positions = offset.shape[1] // (2 * taps), out[0] * out[1], []
    offset, flat = offset.to(dtype).reshape(batch, groups, *kernel, 2, *out), input.to(dtype).flatten(2)
    for axis, size in enumerate((height, width)):
        tap, place = (torch.arange(n, device=input.device) for n in (kernel[axis], out[axis]))
        grid = tap[:, None] * dilation[axis] - padding[axis] + place * stride[axis]
        grid = grid[:, None, :, None] if axis == 0 else grid[None, :, None, :]
        # Two pixels off the map everything is zero, and numbers stay small enough for an int.
        positions.append((grid + offset[:, :, :, :, axis]).clamp(-2, size).reshape(batch, groups, 1, taps * places))
    y, x = positions
    fy, fx = (p - p.detach().floor() for p in positions)
    samples = flat.new_zeros(batch, groups, channels // groups, taps * places)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = y.detach().floor() + down, x.detach().floor() + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long()
        pixel = flat.unflatten(1, (groups, -1)).gather(3, index.expand_as(samples))
        nearness = (fy if down else 1 - fy) * (fx if right else 1 - fx)
        samples = samples + torch.where(inside, pixel, 0) * nearness
    if mask is not None:
        samples = samples * mask.to(dtype).reshape(batch, groups, 1, taps * places)
    with dispatch.without_autocast(input.device.type):
        inner = weight.shape[1] * taps
        weight_groups = channels // weight.shape[1]
        matrix = weight.to(dtype).reshape(weight_groups, len(weight) // weight_groups, inner)
        product = matrix @ samples.reshape(batch, weight_groups, inner, places)
    result = product.reshape(batch, len(weight), *out)
    if bias is not None:
        result = result + bias.to(dtype)[:, None, None]
    return result.to(input.dtype)


def _triton_reasons(input: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = dispatch.triton_reasons(input)
    dtype = dispatch.autocast_dtype(input)
    if dtype not in dispatch.TRITON_DTYPES:
        reasons.append(f"input must be float16, bfloat16 or float32, got {dtype}")
    if dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter cuts bfloat16 where a GPU rounds")
    return reasons


def _cpp_reasons(input: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = native.reasons(input)
    if input.shape[2] * input.shape[3] >= 2**31:
        reasons.append(f"pixels are numbered in 32 bits, got a map of {tuple(input.shape[2:])}")
    return reasons


# Nothing is kept for the backward beside the inputs: columns are kh*kw times as large as the input, and sampling anew
# costs one pass that the gradients of offset and mask need anyway.
def _forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
) -> Tensor:
    tensors = (input, offset, mask, weight, bias)
    return torch_backend.deform_conv2d_fwd(*_sampler(backend, input), *tensors, stride, padding, dilation)


def _outputs(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *args: Any) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0], *offset.shape[2:])


def _backward(grad_out: Tensor, input: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    *others, backend = inputs
    return torch_backend.deform_conv2d_bwd(*_sampler(backend, input), grad_out, input, *others)


def _sampler(backend: str, input: Tensor) -> tuple[ModuleType | type, torch.dtype]:
    """Return what samples, and the dtype of samples and products.

    The library would round the weights of the four corners to half precision: it samples in float32 at least.
    """
    if backend == "triton":
        return _deform_conv2d.backend("triton"), input.dtype
    if backend == "cpp":
        # Products of bfloat16 are worth it where the processor has them, and float16 is not where this runs.
        low = input.dtype == torch.bfloat16 and native.multiplies_bfloat16()
        return _deform_conv2d.backend("cpp"), torch.bfloat16 if low else torch.float32
    return torch_backend.LibrarySampler, torch.promote_types(input.dtype, torch.float32)


def _example(device: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    input, weight = torch.randn(2, 16, 8, 9, device=device), torch.randn(16, 16, 3, 3, device=device)
    offset, mask = torch.randn(2, 18, 8, 9, device=device), torch.rand(2, 9, 8, 9, device=device)
    return (input, offset, weight), {"padding": 1, "mask": mask}


_deform_conv2d = Op(
    deform_conv2d,
    deform_conv2d_reference,
    example=_example,
    reasons={"triton": _triton_reasons, "cpp": _cpp_reasons},
    tensors=5,
    outputs=_outputs,
    forward=_forward,
    backward=_backward,
)
