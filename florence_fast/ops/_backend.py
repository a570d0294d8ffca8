"""How an op chooses its backend, and how it is registered with torch.library: written once, used by every op.

A backend is asked whether it can take the inputs and answers with the list of reasons why not; an empty list
means yes. The choice is made in Python, before the op is entered, and travels into it as a plain ``str``, so that
torch.compile sees a constant.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from florence_fast import env, ranges
from florence_fast.errors import unknown
from florence_fast.ops import _autotune

BACKENDS = ("triton", "cpp", "torch", "reference")
"""In the order in which ``auto`` tries them."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What every kernel computes with."""

_forced: list[str] = []


@dataclass(frozen=True)
class OpEntry:
    """One op, as tests, benchmarks, ``florence-fast info`` and the documentation iterate over it."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    unsupported_reasons: Callable[..., list[str]]
    """``unsupported_reasons(backend, *args, **kwargs)`` with the arguments of ``function``."""
    example: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    """``example(device)`` gives small ``args, kwargs`` that ``function`` accepts."""


OPS: dict[str, OpEntry] = {}


class Explanation(NamedTuple):
    """Whether a backend can run an op here; no reasons means that it can."""

    op: str
    backend: str
    reasons: list[str]


def register_entry(entry: OpEntry) -> None:
    """Put an op into ``OPS``."""
    assert entry.name not in OPS, f"the op {entry.name!r} is registered twice"
    OPS[entry.name] = entry


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside; ``"auto"`` gives the choice back.

    The setting belongs to the process, not to the thread, and wins over FLORENCE_FAST_BACKEND.

    Args:
        name: "auto", "triton", "cpp", "torch" or "reference".

    Raises:
        ValueError: no backend has this name.

    >>> with ff.backend("reference"):
    ...     out = ff.ops.window_attention(qkv, window_size=7, num_heads=3)
    """
    _check_name("backend", name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def backend_in_force() -> str:
    """Return the forced backend, from ``backend(...)`` or else FLORENCE_FAST_BACKEND, or ``"auto"``.

    torch.compile guards on ``backend(...)`` and compiles again when it changes; the variable it reads while tracing.
    """
    if _forced:
        return _forced[-1]
    name = env.read("FLORENCE_FAST_BACKEND")
    _check_name("FLORENCE_FAST_BACKEND", name)
    return name


def choose(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the backend that runs ``op`` on these arguments: the forced one, or the first that can.

    Raises:
        RuntimeError: the forced backend cannot run them; the message holds every reason.
    """
    reasons_of = OPS[op].unsupported_reasons
    forced = backend_in_force()
    if forced == "auto":
        # On a CPU Triton is never taken unasked, and its reasons need not be found at every call.
        on_cpu = bool(args) and args[0].is_cpu
        names = BACKENDS[1:] if on_cpu else BACKENDS
        return next(name for name in names if not _reasons_against_auto(op, name, args, kwargs))
    reasons = reasons_of(forced, *args, **kwargs)
    if reasons:
        raise RuntimeError(f"backend {forced!r} cannot run {op}: " + "; ".join(reasons))
    return forced


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
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


@torch.compiler.assume_constant_result
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast casts nothing: an op decides about its dtypes itself."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext()


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
    dtype = autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def float32_autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype that ``dtype`` gets from an op on autocast's float32 list, where CUDA alone has norms."""
    in_force = device_type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if in_force and dtype in (torch.float16, torch.bfloat16) else dtype


class Op:
    """An op of torch.library, entered directly, some 7 microseconds sooner, by calls of which nobody has to know.

    These are calls in eager mode on plain tensors without gradients. Whatever traces, transforms, records or
    differentiates goes through torch's dispatcher, which tells it of the op.
    """

    def __init__(self, name: str, function: Callable[..., tuple[Tensor, ...]], fake: Callable[..., Any]) -> None:
        self._function = _plain(name, function)
        self._op = torch.library.custom_op(f"florence_fast::{name}", self._function, mutates_args=())
        self._op.register_fake(fake)
        self.register_autograd = self._op.register_autograd

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Run the op; all arguments by position."""
        return self._op(*args) if _concerns_torch(args) else self._function(*args)


def _concerns_torch(args: tuple[Any, ...]) -> bool:
    """Say whether a call has to go through torch's dispatcher."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    differentiates = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN_TENSORS:
            if arg.is_meta or (differentiates and arg.requires_grad):
                return True
        elif kind not in _VALUES:
            return True
    return False


_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str, list, torch.dtype})


def define_pair(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    backward_fake: Callable[..., tuple[Tensor, ...]],
) -> tuple[Op, Op]:
    """Register ``florence_fast::name`` and ``florence_fast::name_backward``; whoever calls it joins them."""
    return Op(name, forward, forward_fake), Op(f"{name}_backward", backward, backward_fake)


def define(
    name: str,
    num_tensors: int,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    backward_fake: Callable[..., tuple[Tensor, ...]],
) -> Op:
    """Register ``florence_fast::name`` and ``florence_fast::name_backward`` with torch.library and join them.

    Args:
        name: the op's name.
        num_tensors: how many leading arguments are tensors or None; the others are plain values.
        forward: ``(*tensors, *values) -> (out, *kept)``; ``kept`` is for the backward alone. Annotated, because
            torch.library reads its schema from it.
        forward_fake: the same with shapes only.
        backward: ``(grad_out, *tensors, *kept, needs: list[bool], *values)`` -> one gradient for each of
            ``tensors``, an empty tensor where ``needs`` is false; ``grad_out`` is contiguous.
        backward_fake: the same with shapes only.
    """
    forward_op, backward_op = define_pair(name, forward, forward_fake, backward, backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # What is kept gets no gradient, and must not cost one made of zeros.
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:num_tensors], *output[1:])
        ctx.values = inputs[num_tensors:]

    def run_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * (num_tensors + len(ctx.values))
        needs = list(ctx.needs_input_grad[:num_tensors])
        # .sum() and opcheck send expanded gradients: the backward sees memory that it can walk through.
        grads = backward_op(grad_out.contiguous(), *ctx.saved_tensors, needs, *ctx.values)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None for _ in ctx.values)

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    return forward_op


def _plain(name: str, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap an implementation so that it runs outside autocast, whatever surrounds the call, and in a named range.

    Here its kernels are tuned, too, where the user wants that: the op is no longer traced, and has all its arguments.
    """
    name = f"op.{name}"

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with ranges.annotate(name), without_autocast(x.device.type):
            if _autotune.wanted(x):
                return _autotune.run(function, x, *args, **kwargs)
            return function(x, *args, **kwargs)

    return run


def _check_name(what: str, name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise unknown(what, name, ("auto", *BACKENDS))
