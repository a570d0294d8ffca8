"""Swin's patch merging: four neighbouring tokens side by side, normalised together, reduced to twice the width.

It stands between the stages of Swin (arXiv 2103.14030, section 3.1), and, along height and width alone, of Video Swin
(2106.13230, section 3.1).

Letters: B batch · T frames · H W map height and width · C channels · M merged tokens of the whole batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast import native
from florence_fast.ops import dispatch
from florence_fast.ops.checks import check_eps, check_tensor
from florence_fast.ops.spec import Op

CHANNELS_STEP = 16
MAX_TRITON_CHANNELS = 2048


def patch_merging(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Merge the tokens of a map two by two, along height and width.

    ``LN([x00, x10, x01, x11]) weight^T``, where xij lies i rows below and j columns to the right of the first of the
    four (2103.14030, section 3.1). The order is that of Microsoft's code, and of its checkpoints.

    Args:
        x: (B, H, W, C) or (B, T, H, W, C), floating.
        norm_weight: (4*C,), usually float32, which autocast does not change.
        norm_bias: (4*C,), the same.
        weight: (2*C, 4*C).
        eps: added to the variance.

    Returns:
        (B, ceil(H/2), ceil(W/2), 2*C), or the same behind B and T, in the dtype of ``x``; under autocast in
        autocast's, unless it is float64.

    Raises:
        TypeError: an argument is no tensor, or a tensor is not floating.
        ValueError: a shape or a device is wrong.
        RuntimeError: the backend that was forced cannot run these inputs; the message says why.

    A map of odd height or width is completed by zeros at its end, which take part in the norm. An empty batch gives an
    empty result. Second derivatives are the reference's.

    >>> x, weight = torch.randn(2, 7, 7, 96), torch.randn(192, 384)
    >>> patch_merging(x, torch.ones(384), torch.zeros(384), weight).shape
    torch.Size([2, 4, 4, 192])
    """
    tensors = (x, norm_weight, norm_bias, weight)
    _check_patch_merging(*tensors, eps)
    backend = dispatch.choose("patch_merging", *tensors, eps=eps)
    x = dispatch.autocast_input(x)
    if backend == "reference":
        return patch_merging_reference(x, norm_weight, norm_bias, weight, eps=eps)
    maps = x.flatten(0, 1) if x.ndim == 5 else x
    out = _patch_merging(maps, norm_weight, norm_bias, weight, eps, backend)
    return out.unflatten(0, x.shape[:2]) if x.ndim == 5 else out


def _check_patch_merging(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> None:
    """Raise what is wrong with the arguments."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim not in (4, 5):
        raise ValueError(f"x must have shape (B, H, W, C) or (B, T, H, W, C), got {tuple(x.shape)}")
    if any(side == 0 for side in x.shape[1:]):
        raise ValueError(f"x must have a map of at least one token and one channel, got shape {tuple(x.shape)}")
    check_eps(eps)
    channels = x.shape[-1]
    check_tensor("x", x)
    check_tensor("norm_weight", norm_weight, (4 * channels,), beside=x)
    check_tensor("norm_bias", norm_bias, (4 * channels,), beside=x)
    check_tensor("weight", weight, (2 * channels, 4 * channels), beside=x)


def patch_merging_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Define ``patch_merging`` in plain PyTorch: the same arguments and result, computed in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with dispatch.without_autocast(x.device.type):
        # written so that a size which is not known yet is seen to be even afterwards
        bottom, right = (2 * ((side + 1) // 2) - side for side in x.shape[-3:-1])
        full = F.pad(x.to(dtype), (0, 0, 0, right, 0, bottom))
        order = ((0, 0), (1, 0), (0, 1), (1, 1))
        rows = torch.cat([full[..., dy::2, dx::2, :] for dy, dx in order], -1)
        centred = rows - rows.mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return ((norm * norm_weight.to(dtype) + norm_bias.to(dtype)) @ weight.to(dtype).T).to(x.dtype)


def _cpp_reasons(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, **_: Any) -> list[str]:
    return native.reasons(x, norm_weight, norm_bias, weight)


def _triton_reasons(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, **_: Any) -> list[str]:
    reasons = dispatch.triton_reasons(x)
    channels, dtype = x.shape[-1], dispatch.autocast_dtype(x)
    if channels % CHANNELS_STEP or channels > MAX_TRITON_CHANNELS:
        reasons.append(
            f"C must be a multiple of {CHANNELS_STEP} and at most {MAX_TRITON_CHANNELS} for the kernels, got {channels}"
        )
    unknown = sorted(
        {str(t) for t in (dtype, norm_weight.dtype, norm_bias.dtype, weight.dtype) if t not in dispatch.TRITON_DTYPES}
    )
    if unknown:
        reasons.append(f"tensors must be float16, bfloat16 or float32, got {', '.join(unknown)}")
    if dtype == torch.bfloat16 and dispatch.interpreting():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16, not their values")
    return reasons


# Nothing is kept for the backward: it walks through whole rows of x in any case, so that their mean and rstd cost
# arithmetic that memory hides, where keeping them would cost 8 bytes a row.
def _outputs(x: Tensor, *args: Any) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, 2 * channels)


def _flops(x: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the product of 4C by 2C channels, as torch.utils.flop_counter counts that of ``nn.Linear``."""
    batch, height, width, channels = x
    return 2 * batch * ((height + 1) // 2) * ((width + 1) // 2) * 8 * channels**2


def _example(device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    x = torch.randn(2, 7, 7, 32, device=device)
    norm_weight, norm_bias = torch.randn(2, 128, device=device)
    return (x, norm_weight, norm_bias, torch.randn(64, 128, device=device)), {}


_patch_merging = Op(
    patch_merging,
    patch_merging_reference,
    example=_example,
    reasons={"triton": _triton_reasons, "cpp": _cpp_reasons},
    tensors=4,
    outputs=_outputs,
    flops=_flops,
)
