"""Matrix products, for tensors that need no graph: on a CPU by the fastest of three libraries.

PyTorch sends float32 products to MKL. oneDNN's product, which torch.compile takes on CPUs, is there in eager mode too,
and ``csrc/level/matmul.cpp`` is ours. Which is fastest depends on the processor, and `library` is a fixed rule: it is
the same in every process of a machine, and so are the bits. ``python -m bench.cpu.products`` measures all three.

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

from florence_fast import native, processor

ONEDNN, NATIVE, PLAIN = "onednn", "native", "plain"
DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN's product may be asked for."""

FLOAT32_LIBRARIES = {("AuthenticAMD", "AVX512"): ONEDNN, ("AuthenticAMD", "AVX2"): NATIVE}
"""Maker and PyTorch's vector instructions of a processor -> the library whose float32 products are faster than MKL's.

MKL uses no AVX-512 on AMD's processors: two Zen 5 cores, shapes of Swin-T, oneDNN 2.0 to 2.4 times as fast.
With AVX2 MKL is faster than oneDNN: two Zen 3 cores, one block of each shape of Swin-T, ms of MKL and oneDNN:
y = x w^T + b 170 and 182, dx 169 and 195, dw 164 and 240. Our kernel is faster than both there from `NATIVE_ROWS` rows
on: y 1.20 times and dx 1.17 times as fast as MKL. dw, which sums over the rows, gains only where those are few.
On Intel's processors MKL uses AVX-512 itself, and on arm64 PyTorch chooses: not measured yet, so the plain product.
"""
NATIVE_ROWS = 192
NATIVE_SUMMED_ROWS = 512
NATIVE_FLOPS = 8_000_000


def library(dtype: torch.dtype) -> str:
    """Return which library takes products of ``dtype`` on this processor, if they are long enough for it."""
    if dtype != torch.float32:
        return ONEDNN  # bfloat16: the same library either way, 1.0 to 1.4 times as fast without the dispatcher
    kind = (processor.vendor(), torch.backends.cpu.get_cpu_capability())
    found = FLOAT32_LIBRARIES.get(kind, PLAIN)
    return PLAIN if found == NATIVE and not (native.levels() and native.level() == "avx2") else found


_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_CHUNK_BYTES = 4 << 20
_LONG_CHUNK_BYTES = 16 << 20  # where every chunk adds to the whole gradient of a weight


def widens(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Say whether products of ``x``, or of another dtype beside it, run in float32 because 16 bits would be slow."""
    format = _FORMATS.get(x.dtype if dtype is None else dtype)
    return format is not None and x.is_cpu and _lacks_units(format)


def _lacks_units(format: str) -> bool:
    return not processor.units(format).fast


# torch.compiler.assume_constant_result would import the compiler.
_lacks_units._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def widened(*tensors: Tensor | None) -> tuple[Any, ...]:
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
    if _suits_native(x.numel() // max(x.shape[-1], 1), x, weight) and (bias is None or bias.dtype == x.dtype):
        out = x.new_empty(*x.shape[:-1], len(weight))
        _native(x.reshape(-1, x.shape[-1]), weight.T, bias, out.view(-1, len(weight)))
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
    elif _suits_native(len(x), x, weight):
        _native(x, weight.T, bias, out)
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
    if _suits_native(len(a), a, b):
        out = a.new_empty(len(a), b.shape[1])
        _native(a, b, None, out)
        return out
    # In bfloat16 a plain product is oneDNN's already, and reads either operand transposed at no cost.
    return _onednn(a, b.T, None) if a.dtype == torch.float32 and _suits_onednn(a, b) else a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write ``a b`` to ``out``."""
    if _suits_native(len(a), a, b):
        _native(a, b, None, out)
    elif widens(a) or (a.dtype == torch.float32 and _suits_onednn(a, b)):
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def matmul_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a^T b``: (R, M) and (R, N), the product of the gradient of a weight."""
    if widens(a):
        total: Any = None
        for rows in chunks(len(a), max(a.shape[1], b.shape[1]), long=True):
            term = matmul_over_rows(a[rows].float(), b[rows].float())
            total = term if total is None else total.add_(term)
        return total.to(a.dtype)
    if len(a) <= NATIVE_SUMMED_ROWS and _suits_native(len(a), a, b):
        out = a.new_empty(a.shape[1], b.shape[1])
        _native(a.T, b, None, out)
        return out
    return weight_by_onednn(a, b) if a.dtype == torch.float32 and _suits_onednn(a, b) else a.T @ b


def _suits_native(rows: int, x: Tensor, y: Tensor) -> bool:
    """Say whether our kernel takes the product of x, ``rows`` by something, and y: as long as both are float32."""
    return (
        rows >= NATIVE_ROWS
        and x.dtype == y.dtype == torch.float32
        and x.is_cpu
        and 2 * x.numel() * y.numel() >= NATIVE_FLOPS * min(x.shape[-1], y.shape[-1])
        and library(torch.float32) == NATIVE
    )


def _native(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``a b + bias`` to ``out``: (M, K), (K, N), (N,) and (M, N); float32, ``out`` with rows in one piece."""
    torch.ops.florence_fast.product(a, b, bias, out)


def _call_native(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    bias = None if bias is None else bias.contiguous()
    places = (a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), bias, out.data_ptr(), out.stride(0))
    native.call("matmul", *a.shape[:1], b.shape[1], a.shape[1], *places)


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
        and library(x.dtype) == ONEDNN
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


# A schema of its own, so that profilers see it and FLOPs are counted.
_LIBRARY = torch.library.Library("florence_fast", "FRAGMENT")
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out) -> ()")
_LIBRARY.impl("product", _call_native, "CPU")
_LIBRARY.impl("product", lambda a, b, bias, out: None, "Meta")


@register_flop_formula(torch.ops.florence_fast.product)
def _native_flops(a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[1]


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Count oneDNN's product as torch.utils.flop_counter counts that of ``F.linear``."""
    return 2 * math.prod(x) * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
