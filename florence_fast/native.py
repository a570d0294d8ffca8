"""The native extension ``florence_fast._C``: whether it is there, which instructions it uses, how it is called.

It is built from ``csrc/`` when the package is installed, for several instruction sets at once; the best that the
processor has is taken, or the one that FLORENCE_FAST_CPU names. It knows addresses and sizes only, so that one build
serves every version of PyTorch.

Names: ``csrc/`` holds the sources, ``_C`` is what they compile to, and this module loads it. "native" is the extension
as a whole, which also serves `florence_fast.data`. "cpp" is the backend of the ops that calls it (``ops/<op>/cpp.py``).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from florence_fast import env
from florence_fast.build_failure import build_failure
from florence_fast.errors import unknown

try:
    from florence_fast import _C  # after torch, whose threads it then shares

    _why = None
except ImportError as error:
    _C = None
    # absent, or there and not loadable: the loader then says what it lacks
    _why = build_failure() or (None if "cannot import name '_C'" in str(error) else str(error))

NOT_BUILT = f"the native extension was not built; {_why or 'it takes a C++ compiler at installation'}"
"""What to say where the extension is absent, with what the build or the loader said."""

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
"""The instruction sets, each with those before it; their places are the numbers that the extension knows them by."""

_LEVELS_HERE = tuple(name for name in _C.levels() if name) if _C else ()

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels compute with, and the extension's numbers for it."""


def extension() -> ModuleType | None:
    """Return the extension, or None where it was not built."""
    return _C


def levels() -> tuple[str, ...]:
    """Return the names of the levels that run here, none where the extension was not built."""
    return _LEVELS_HERE if extension() else ()


def level() -> str:
    """Return the level in force: the one that FLORENCE_FAST_CPU names, or the best that runs here.

    Raises:
        ValueError: FLORENCE_FAST_CPU names no level.
        RuntimeError: it names one that does not run here, or no level does, because the extension was not built.
    """
    name, present = env.read("FLORENCE_FAST_CPU"), _LEVELS_HERE if extension() else ()
    if name not in ("auto", *LEVELS):
        raise unknown("FLORENCE_FAST_CPU", name, ("auto", *LEVELS))
    if not present:
        raise RuntimeError(NOT_BUILT)
    if name == "auto":
        return present[-1]
    if name not in present:
        raise RuntimeError(f"FLORENCE_FAST_CPU={name} does not run here; these do: {', '.join(present)}")
    return name


def multiplies_bfloat16() -> bool:
    """Say whether the level in force has products of bfloat16, so that the library's are faster than float32's."""
    return level() in ("avx512_bf16", "amx")


def reasons(*tensors: Tensor | None) -> list[str]:
    """Say why no native kernel can run on ``tensors``, whatever the op; empty if one can."""
    if extension() is None:
        return [NOT_BUILT]
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in DTYPES):
            break
    else:
        return []
    given = [tensor for tensor in tensors if tensor is not None]
    found = []
    devices = sorted({tensor.device.type for tensor in given} - {"cpu"})
    if devices:
        found.append(f"native kernels run on the CPU, not on {', '.join(devices)}")
    dtypes = sorted({str(tensor.dtype) for tensor in given if tensor.dtype not in DTYPES})
    if dtypes:
        found.append(f"tensors must be float32, bfloat16 or float16, got {', '.join(dtypes)}")
    return found


def call(name: str, *args: Any) -> None:
    """Call a kernel at the level in force on torch's threads. Tensors become addresses, dtypes numbers, None null.

    The tensors must be contiguous and, like the memory they lie in, outlive the call, which returns when it is done.
    """
    plain: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter or isinstance(arg, Tensor):
            assert arg.is_contiguous(), f"native kernels walk through contiguous memory, got strides {arg.stride()}"
            plain.append(arg.data_ptr())
        elif arg is None:
            plain.append(0)
        else:
            plain.append(DTYPES[arg] if kind is torch.dtype else arg)
    getattr(_C, name)(LEVELS.index(level()), torch.get_num_threads(), *plain)
