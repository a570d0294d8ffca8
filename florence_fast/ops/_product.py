"""Matrix products, for tensors that need no graph: on a CPU by the faster of the libraries that PyTorch carries.

PyTorch sends float32 products to MKL. oneDNN's product, which torch.compile takes on CPUs, is there in eager mode too.
Which of the two is faster depends on the processor, so `onednn_is_faster` holds a fixed rule for each kind: the library
is the same in every process of a machine, and so are the bits. ``python -m bench.products`` measures both.

Where the processor has no units for a 16-bit format, PyTorch multiplies it one number at a time, 100 times as slowly as
float32. Such operands are widened to float32, some rows at a time, and the product is rounded once.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from florence_fast import processor

DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN's product may be asked for."""

ONEDNN_IN_FLOAT32 = {("AuthenticAMD", "AVX512")}
"""Maker and PyTorch's vector instructions of the processors on which oneDNN's float32 products are faster than MKL's.

MKL uses no AVX-512 on AMD's processors: two Zen 5 cores, shapes of Swin-T, oneDNN 2.0 to 2.4 times as fast.
With AVX2 MKL is faster: two Zen 3 cores, one block of each shape of Swin-T, ms of MKL and oneDNN: y = x w^T + b 170
and 182, dx 169 and 195, dw 164 and 240; at the shapes where oneDNN wins it does so by a tenth.
On Intel's processors MKL uses AVX-512 itself, and on arm64 PyTorch chooses: not measured yet, so the plain product.
"""


def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Say whether products of ``dtype`` go to oneDNN on this processor."""
    if dtype != torch.float32:
        return True  # bfloat16: the same library either way, 1.0 to 1.4 times as fast without the dispatcher's detours
    return (processor.vendor(), torch.backends.cpu.get_cpu_capability()) in ONEDNN_IN_FLOAT32


_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_CHUNK_BYTES = 4 << 20
_LONG_CHUNK_BYTES = 16 << 20  # where every chunk adds to the whole gradient of a weight


def widens(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Say whether products of ``x``, or of another dtype beside it, run in float32 because 16 bits would be slow."""
    format = _FORMATS.get(x.dtype if dtype is None else dtype)
    return format is not None and x.is_cpu and _lacks_units(format)


def _lacks_units(format: str) -> bool:
    return not processor.units(format).fast


_lacks_units._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


def widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors in float32."""
    return tuple(None if tensor is None else tensor.float() for tensor in tensors)


def chunks(rows: int, width: int, long: bool = False) -> Iterator[slice]:
    """Walk over rows whose widest float32 form has ``width`` columns; no rows are one empty chunk."""
    step = max(64, (_LONG_CHUNK_BYTES if long else _CHUNK_BYTES) // (4 * width))
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias``: x (..., K), weight (N, K), bias (N,)."""
    if widens(x):
        out = x.new_empty(*x.shape[:-1], len(weight))
        linear_into(out.view(-1, len(weight)), x.reshape(-1, x.shape[-1]), weight, bias)
        return out
    if _suits_onednn(x, weight) and (bias is None or bias.dtype == x.dtype):
        return _onednn(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write ``x weight^T + bias`` to ``out``; x in two dimensions."""
    if widens(x):
        weight, bias = widened(weight, bias)
        for rows in chunks(len(x), max(weight.shape)):
            out[rows] = linear(x[rows].float(), weight, bias)
    elif x.dtype == torch.float32 and _suits_onednn(x, weight):
        out.copy_(linear(x, weight, bias))  # a copy of what the caches hold costs less than MKL's product
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b``: (M, K) and (K, N)."""
    if widens(a):
        out, b = a.new_empty(len(a), b.shape[1]), b.float()
        for rows in chunks(len(a), max(b.shape)):
            out[rows] = matmul(a[rows].float(), b)
        return out
    # In bfloat16 a plain product is oneDNN's already, and reads either operand transposed at no cost.
    return _onednn(a, b.T, None) if a.dtype == torch.float32 and _suits_onednn(a, b) else a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write ``a b`` to ``out``."""
    if widens(a) or (a.dtype == torch.float32 and _suits_onednn(a, b)):
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def matmul_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a^T b``: (R, M) and (R, N), the product of the gradient of a weight."""
    if widens(a):
        total = None
        for rows in chunks(len(a), max(a.shape[1], b.shape[1]), long=True):
            term = matmul_over_rows(a[rows].float(), b[rows].float())
            total = term if total is None else total.add_(term)
        return total.to(a.dtype)
    return weight_by_onednn(a, b) if a.dtype == torch.float32 and _suits_onednn(a, b) else a.T @ b


def weight_by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a^T b`` by oneDNN."""
    # The wider operand serves better as the weight: 85 against 50 GFLOP/s on a loaded machine.
    return _onednn(a.T, b.T, None) if a.shape[1] <= b.shape[1] else _onednn(b.T, a.T, None).T.contiguous()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Any strides but the bias's, which oneDNN reads as if it lay in one piece.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suits_onednn(x: Tensor, y: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == y.dtype
        and x.numel() > 0
        and y.numel() > 0
        and onednn_is_faster(x.dtype)
        and _has_onednn(x.dtype)
    )


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Say whether this build of PyTorch has oneDNN's product for ``dtype``, by trying it once."""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES:
        return False
    with _disable_current_modes():  # whoever counts FLOPs or fakes memory must not see it
        ones = torch.ones(2, 2, dtype=dtype, device="cpu")
        try:
            product = _onednn(ones, ones, ones[0])
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return torch.equal(product, torch.full_like(product, 3))


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Count oneDNN's product as torch.utils.flop_counter counts that of ``F.linear``."""
    return 2 * math.prod(x) * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
