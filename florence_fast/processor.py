"""The processor: its maker and name, which 16-bit formats it multiplies in hardware, and which it only converts.

PyTorch's products of a format without units run one number at a time: on AVX2, bfloat16 takes some 100 times as long as
float32. Nothing here needs the native extension, and torch is imported only when asked, so that ``--help`` stays quick.
"""

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple

from florence_fast import env

# format -> (flag of /proc/cpuinfo, query of torch.cpu, name for people), the best units first
_X86 = {
    "bf16": (
        ("amx_bf16", "_is_amx_tile_supported", "AMX"),
        ("avx512_bf16", "_is_avx512_bf16_supported", "AVX-512 bf16"),
    ),
    "fp16": (("amx_fp16", "_is_amx_fp16_supported", "AMX fp16"), ("avx512_fp16", "", "AVX-512 fp16")),
}
_ARM = {"bf16": ("bf16", "Arm bf16"), "fp16": ("asimdhp", "Arm fp16")}

# variable -> the values in upper case with which the units stay unused, format by format
_BELOW_AVX512 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
_ONEDNN = {
    "bf16": _BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"},
    "fp16": _BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"},
}
_HELD_BY = {
    "FLORENCE_FAST_CPU": {"bf16": {"SCALAR", "AVX2", "AVX512"}, "fp16": {"SCALAR", "AVX2", "AVX512", "AVX512_BF16"}},
    "ATEN_CPU_CAPABILITY": {"bf16": {"DEFAULT", "AVX2"}, "fp16": {"DEFAULT", "AVX2"}},
    "ONEDNN_MAX_CPU_ISA": _ONEDNN,
    "DNNL_MAX_CPU_ISA": _ONEDNN,
}


CPUINFO = Path("/proc/cpuinfo")
"""Where Linux describes each processor, in lines ``field : value``, as lscpu shows them."""


class Units(NamedTuple):
    """Whether products of a 16-bit format are fast, and why."""

    fast: bool
    reason: str


def vendor() -> str:
    """Return the maker as x86 processors spell it, "AuthenticAMD" or "GenuineIntel"; empty where it is not known."""
    given = _cpuinfo().get("vendor_id") or platform.processor()  # Windows: "AMD64 Family 25 Model 1, AuthenticAMD"
    return next((name for name in ("AuthenticAMD", "GenuineIntel") if name in given), "")


def name() -> str:
    """Return the model name, or the architecture where the system gives none."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def units(format: str) -> Units:
    """Say whether PyTorch multiplies ``format``, "bf16" or "fp16", in hardware on this processor.

    A variable that holds PyTorch, oneDNN or our kernels to older instructions counts; it is read at every call.

    >>> units("bf16")
    Units(fast=False, reason='this processor has no bf16 units')
    """
    return _units(format, *(_value(name) for name in _HELD_BY))


def _value(variable: str) -> str:
    return env.read(variable) if variable in env.NAMES else os.environ.get(variable, "")


@functools.cache
def _units(format: str, *values: str) -> Units:
    found = _found(format)
    if found is None:
        return Units(False, f"this processor has no {format} units")
    for (variable, held), value in zip(_HELD_BY.items(), values, strict=True):
        if value.upper() in held[format]:
            return Units(False, f"{variable}={value} holds this processor below its {format} units ({found})")
    if not _library_multiplies(format):
        return Units(False, f"this build of PyTorch does not use the {format} units ({found}) of this processor")
    return Units(True, f"this processor multiplies {format} ({found})")


def _found(format: str) -> str | None:
    """Return the name of the units that multiply ``format``, None where there are none."""
    import torch

    flags = _cpuinfo_flags()
    if platform.machine().lower() in ("aarch64", "arm64"):
        flag, name = _ARM[format]
        return name if flag in flags else None
    for flag, query, name in _X86[format]:
        if flag in flags or (not flags and getattr(torch.cpu, query, bool)()):
            return name
    return None


def _cpuinfo_flags() -> frozenset[str]:
    """Return the flags of the first processor in /proc/cpuinfo, none where there is no such file."""
    fields = _cpuinfo()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, none where there is no such file."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {field.strip(): value.strip() for field, _, value in lines}


def _library_multiplies(format: str) -> bool:
    """Say whether oneDNN, which PyTorch takes for 16-bit products on a CPU, is there and accepts ``format``."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    query = getattr(torch.ops.mkldnn, f"_is_mkldnn_{format}_supported", None)
    return True if query is None else bool(query())
