"""The environment variables that change what the package does: one table, read at every call, never cached.

FLORENCE_FAST_NVTX alone is read once, when `florence_fast.ranges` is imported: its ranges must cost nothing while off.
"""

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One variable: its name, what holds when it is unset, and what it decides."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "FLORENCE_FAST_AUTOTUNE", "0", "1 finds the fastest launch of each kernel at its first call, and keeps it"
    ),
    Variable("FLORENCE_FAST_BACKEND", "auto", "backend of every op: auto, triton, cpp, torch or reference"),
    Variable(
        "FLORENCE_FAST_CACHE_DIR", "~/.cache/florence_fast", "where FLORENCE_FAST_AUTOTUNE keeps what it has found"
    ),
    Variable(
        "FLORENCE_FAST_CPU", "auto", "instructions of the native kernels: auto, scalar, avx2, avx512, avx512_bf16, amx"
    ),
    Variable("FLORENCE_FAST_DEBUG", "0", "1 prints the traceback of an error of the command line, for a bug report"),
    Variable("FLORENCE_FAST_NVTX", "0", "1 makes NVTX ranges, for Nsight, around ops, stages, phases and data"),
)

_DEFAULTS = {variable.name: variable.default for variable in VARIABLES}
NAMES = tuple(_DEFAULTS)

# Variables of others that explain a surprising speed or device; shown by `florence-fast info`. Those that name
# instructions are read by `florence_fast.processor`.
OF_OTHERS = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
)


def read(name: str) -> str:
    """Return the value of one of ``VARIABLES`` as it is now, or its default when it is unset or empty.

    Raises:
        KeyError: ``name`` is not in the table.
    """
    default = _DEFAULTS[name]
    return os.environ.get(name) or default
