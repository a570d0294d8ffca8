"""A strided convolution and a LayerNorm on channels-last maps: CvT's convolutional token embedding.

It is CoSwin's stem, 7x7 with stride 4, and its merge, 3x3 with stride 2 (CvT, arXiv 2103.15808, section 3.2; Florence,
2111.11432, section 2.3); in 3-D, the stem of a video tower.

Letters: B batch · T frames · H W map height and width · C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops import dispatch
from florence_fast.ops.checks import check_eps, check_tensor, per_axis
from florence_fast.ops.linear import convolution
from florence_fast.ops.spec import Op
from florence_fast.ranges import annotated


@annotated("op.conv_embed")
def conv_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    """Convolve a map and normalise the channels of every token of the result.

    ``LN(conv(x) + bias)`` (2103.15808, section 3.2, equation 1 and the LayerNorm after it).

    Args:
        x: (B, H, W, Cin) or (B, T, H, W, Cin), floating.
        weight: (Cout, Cin, kh, kw) or (Cout, Cin, kt, kh, kw), as torch.nn.Conv2d and Conv3d hold it.
        bias: (Cout,) or None.
        norm_weight: (Cout,).
        norm_bias: (Cout,).
        stride: tokens per axis from one window to the next.
        padding: zeros per axis at both ends.
        eps: added to the variance.

    Returns:
        (B, H', W', Cout) or (B, T', H', W', Cout), contiguous, H' = (H + 2*padding - kh) // stride + 1; in the dtype
        of ``x``. Autocast does what it does to a convolution and to a LayerNorm: the convolution is in autocast's
        dtype, and the norm in float32 on CUDA.

    Raises:
        TypeError: an argument is no tensor, or a tensor is not floating.
        ValueError: a shape, a size or a device is wrong, or the kernel is larger than the padded map.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    An empty batch gives an empty result. It can be differentiated as often as the library's parts can.

    >>> image = torch.randn(2, 64, 64, 3)
    >>> weight, norm_weight, norm_bias = torch.randn(48, 3, 7, 7), torch.ones(48), torch.zeros(48)
    >>> conv_embed(image, weight, None, norm_weight, norm_bias, stride=4, padding=2).shape
    torch.Size([2, 16, 16, 48])
    """
    tensors, options = (x, weight, bias, norm_weight, norm_bias), {"stride": stride, "padding": padding, "eps": eps}
    strides, paddings = _check_conv_embed(*tensors, **options)
    backend = dispatch.choose("conv_embed", *tensors, **options)
    if backend == "reference":
        return conv_embed_reference(*tensors, **options)
    return _with_library(*tensors, strides, paddings, eps)


def _check_conv_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    eps: float,
) -> tuple[list[int], list[int]]:
    """Raise what is wrong with the arguments; return stride and padding per axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim not in (4, 5):
        raise ValueError(f"x must have shape (B, H, W, C) or (B, T, H, W, C), got {tuple(x.shape)}")
    if any(side == 0 for side in x.shape[1:]):
        raise ValueError(f"x must have a map of at least one token and one channel, got shape {tuple(x.shape)}")
    check_tensor("x", x)
    check_tensor("weight", weight, beside=x)
    axes, channels = x.ndim - 2, x.shape[-1]
    if weight.ndim != axes + 2 or weight.shape[1] != channels or 0 in weight.shape:
        sides = ", kt, kh, kw)" if axes == 3 else ", kh, kw)"
        raise ValueError(f"weight must have shape (Cout, {channels}{sides}, got {tuple(weight.shape)}")
    strides, paddings = per_axis("stride", stride, axes), per_axis("padding", padding, axes)
    if min(strides) < 1:
        raise ValueError(f"stride must be positive on every axis, got {stride!r}")
    if min(paddings) < 0:
        raise ValueError(f"padding must not be negative, got {padding!r}")
    if any(s + 2 * p < k for s, p, k in zip(x.shape[1:-1], paddings, weight.shape[2:], strict=True)):
        raise ValueError(
            f"the kernel {tuple(weight.shape[2:])} of weight must fit into the map of x with padding={padding!r}, "
            f"got a map of {tuple(x.shape[1:-1])}"
        )
    check_eps(eps)
    outputs = (weight.shape[0],)
    if bias is not None:
        check_tensor("bias", bias, outputs, beside=x)
    check_tensor("norm_weight", norm_weight, outputs, beside=x)
    check_tensor("norm_bias", norm_bias, outputs, beside=x)
    return strides, paddings


def conv_embed_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    """Define ``conv_embed`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    axes = x.ndim - 2
    strides, paddings = per_axis("stride", stride, axes), per_axis("padding", padding, axes)
    dtype = torch.promote_types(x.dtype, torch.float32)
    result_dtype = _result_dtype(x)
    with dispatch.without_autocast(x.device.type):
        windows = F.pad(x.to(dtype), [0, 0, *(p for padding in reversed(paddings) for p in (padding, padding))])
        for axis, (step, side) in enumerate(zip(strides, weight.shape[2:], strict=True), start=1):
            windows = windows.unfold(axis, side, step)
        # (B, [T',] H', W', Cin, [kt,] kh, kw)
        out = windows.flatten(-1 - axes) @ weight.to(dtype).flatten(1).T
        if bias is not None:
            out = out + bias.to(dtype)
        centred = out - out.mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return (norm * norm_weight.to(dtype) + norm_bias.to(dtype)).to(result_dtype)


def _result_dtype(x: Tensor) -> torch.dtype:
    """Give the dtype of the result: autocast makes norms float32 on CUDA, and leaves them alone on a CPU."""
    dtype = dispatch.autocast_dtype(x)
    casts = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and dtype != torch.float64
    return torch.float32 if casts else dtype


# The library's parts under the library's autograd: what is kept for the backward is the input of each. A registered
# op would only hide them from torch.compile. On a CPU the convolution takes 0.4 to 1.2 of the time of gathering the
# taps for one product, at the stems and merges of florence_nano and coswin_tiny; only the backward of maps of 4x4 is
# slower by it, 1.5 to 1.9 times.
def _with_library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: list[int],
    padding: list[int],
    eps: float,
) -> Tensor:
    convolve, layout = (F.conv2d, torch.channels_last) if x.ndim == 4 else (F.conv3d, torch.channels_last_3d)
    # The permuted view of a channels-last map is what convolutions call channels_last: nothing is copied.
    maps = x.movedim(-1, 1).contiguous(memory_format=layout)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = convolution(convolve, maps, weight, bias, stride, padding).movedim(1, -1)
    return _norm(out, norm_weight, norm_bias, eps).contiguous()


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the channels of every token."""
    if x.dtype != weight.dtype and not x.is_cpu and not torch.is_autocast_enabled(x.device.type):
        # Only on a CPU does the library take float32 weights beside 16-bit rows.
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _example(device: str) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    x, weight = torch.randn(2, 8, 8, 16, device=device), torch.randn(32, 16, 3, 3, device=device)
    return (x, weight, None, *torch.randn(2, 32, device=device)), {"stride": 2, "padding": 1}


Op(conv_embed, conv_embed_reference, example=_example, plain=True)
