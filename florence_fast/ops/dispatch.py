"""How an op chooses its backend: written once, used by every op.

A backend is asked whether it can take the inputs and answers with the list of reasons why not; an empty list
means yes. The choice is made in Python, before the op is entered, and travels into it as a plain ``str``, so that
torch.compile sees a constant.
"""

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from florence_fast import env, ranges
from florence_fast.errors import unknown

if TYPE_CHECKING:
    from florence_fast.ops.spec import Op

BACKENDS = ("triton", "cpp", "torch", "reference")
"""In the order in which ``auto`` tries them."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What every kernel computes with."""

_forced: list[str] = []
"""What ``backend(...)`` has forced in the thread that imported this module, usually the main one."""
_own = threading.local()
"""``names``: the same of each thread. A plain object, because torch.compile guards on the attributes of no other."""
_own.names = _forced


OPS: dict[str, "Op"] = {}
"""Every op by its name, as tests, benchmarks, ``florence-fast info`` and the documentation iterate over it."""


class Explanation(NamedTuple):
    """Whether a backend can run an op here; no reasons means that it can."""

    op: str
    backend: str
    reasons: list[str]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside; ``"auto"`` gives the choice back.

    The setting belongs to the thread. A thread without a setting of its own, such as those that run a backward on
    GPUs, follows the main thread. It wins over FLORENCE_FAST_BACKEND.

    Args:
        name: "auto", "triton", "cpp", "torch" or "reference".

    Raises:
        ValueError: no backend has this name.

    >>> with ff.backend("reference"):
    ...     out = ff.ops.window_attention(qkv, window_size=7, num_heads=3)
    """
    _check_name("backend", name)
    if not hasattr(_own, "names"):
        _own.names = []
    names = _own.names
    names.append(name)
    try:
        yield
    finally:
        names.pop()


def backend_in_force() -> str:
    """Return the forced backend, from ``backend(...)`` or else FLORENCE_FAST_BACKEND, or ``"auto"``.

    torch.compile guards on ``backend(...)`` and compiles again when it changes; the variable it reads while tracing.
    """
    names = getattr(_own, "names", _forced) or _forced
    if names:
        return names[-1]
    name = env.read("FLORENCE_FAST_BACKEND")
    if name != "auto":
        _check_name("FLORENCE_FAST_BACKEND", name)
    return name


def choose(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the backend that runs ``op`` on these arguments: the forced one, or the first that can.

    What the kernels have no rule for is computed by the reference, which is made of PyTorch's own operations alone:
    transforms of torch.func, forward-mode AD, and ONNX graphs. A program of torch.export holds ``"auto"``: the machine
    that runs it chooses, by `first_that_can`.

    Raises:
        RuntimeError: the forced backend cannot run them; the message holds every reason.
    """
    entry = OPS[op]
    forced = backend_in_force()
    exported = torch.compiler.is_exporting()
    recorded = exported or not (torch.compiler.is_dynamo_compiling() or torch._C._get_tracing_state() is None)
    if not entry.plain and (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (recorded and torch.onnx.is_in_onnx_export())
    ):
        if forced in ("auto", "reference"):
            return "reference"
        raise RuntimeError(
            f"backend {forced!r} cannot run {op} in torch.func, forward-mode AD or torch.onnx.export: "
            f"use ff.backend('reference'), or ff.restore on an accelerated model"
        )
    if forced == "auto":
        return "auto" if exported and not entry.plain else first_that_can(op, *args, **kwargs)
    reasons = entry.unsupported_reasons(forced, *args, **kwargs)
    if reasons:
        raise RuntimeError(f"backend {forced!r} cannot run {op}: " + "; ".join(reasons))
    return forced


def first_that_can(op: str, *args: Any, **kwargs: Any) -> str:
    """Return what ``auto`` takes for ``op`` on these arguments."""
    # On a CPU Triton is never taken unasked, and its reasons need not be found at every call.
    on_cpu = bool(args) and args[0].is_cpu
    if not (on_cpu or _reasons_against_auto(op, "triton", args, kwargs)):
        return "triton"
    entry = OPS[op]
    for name in BACKENDS[1:]:
        if not entry.unsupported_reasons(name, *args, **kwargs):
            return name
    raise AssertionError(f"the reference of {op} runs everything")


def is_transformed() -> bool:
    """Say whether a transform of torch.func or forward-mode AD is in force, for which the kernels have no rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def explain(device: str | None = None) -> list[Explanation]:
    """List, for every op, each backend in the order of preference with the reasons why it cannot run here.

    The first row of an op that has no reasons is what ``auto`` takes.

    Args:
        device: where the op would run; CUDA if there is one, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for entry in OPS.values():
        args, kwargs = entry.example(device)
        rows += [
            Explanation(entry.name, name, _reasons_against_auto(entry.name, name, args, kwargs)) for name in BACKENDS
        ]
    return rows


def _reasons_against_auto(op: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Give the reasons for which ``auto`` passes a backend by: it cannot, or it would only interpret the kernel."""
    reasons = OPS[op].unsupported_reasons(name, *args, **kwargs)
    if name == "triton" and not reasons and interpreting():
        return ["Triton's interpreter is for proofs: it runs only where it is forced"]
    return reasons


def interpreting() -> bool:
    """Say whether Triton, if it is imported in this process, interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_reasons(x: Tensor) -> list[str]:
    """Say why no Triton kernel can run on ``x``, whatever the op; empty if one can."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    if x.device.type == "cpu":
        return [] if interpreting() else ["kernels run on the CPU only under TRITON_INTERPRET=1"]
    if x.device.type != "cuda":
        return [f"kernels run on CUDA devices, not on {x.device.type!r}"]
    major, minor = _capability(x.device.index or 0)
    return (
        [] if major >= 8 else [f"kernels need compute capability 8.0 (A100) or newer, this device has {major}.{minor}"]
    )


def allows_tf32(x: Tensor) -> bool:
    """Say whether the user lets float32 products round their factors to TF32, as torch's own would."""
    if x.dtype != torch.float32:
        return False
    # The older question raises where the answer was given by the newer setting, which torch has since 2.9.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if precision is None else precision == "tf32"


def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


# What torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes seconds.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast casts nothing: an op decides about its dtypes itself."""
    if device_type == "cpu" and not torch.is_autocast_enabled("cpu"):  # at once, for small calls
        return ranges.OFF
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else ranges.OFF


def _autocasts(device_type: str) -> bool:
    """Say whether autocast is in force on a kind of device; CPUs and GPUs are known to have it, which saves a call."""
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast would give the input of a matrix product; without autocast the one it has."""
    device_type = x.device.type
    if not _autocasts(device_type) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_input(x: Tensor) -> Tensor:
    """Cast ``x`` to its ``autocast_dtype``."""
    if x.is_cpu and not torch.is_autocast_enabled("cpu"):  # at once, for small calls
        return x
    dtype = autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def float32_autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype that ``dtype`` gets from an op on autocast's float32 list, where CUDA alone has norms."""
    in_force = device_type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if in_force and dtype in (torch.float16, torch.bfloat16) else dtype


def _check_name(what: str, name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise unknown(what, name, ("auto", *BACKENDS))
