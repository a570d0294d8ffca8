"""Named ranges around ops, stages of the towers, phases of the gradient cache and steps of the data.

They are for Nsight, as NVTX ranges, and for torch.profiler, as its user annotations; docs/profiling.md lists the
names. They are off, and then cost one test of a module's variable, unless FLORENCE_FAST_NVTX=1 was set when this
module was imported, or `enabled` is in force. What torch.compile and torch.export trace never holds one.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.autograd import profiler

from florence_fast import env
from florence_fast.errors import require, unknown

PREFIX = "ff."
"""What every range's name begins with: so a trace that holds other names too can be searched for ours."""

DOMAIN = "florence_fast"
"""The NVTX domain, where the ``nvtx`` package makes the ranges."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Nvtx(NamedTuple):
    """The two functions that open and close an NVTX range of this thread."""

    push: Callable[[str], Any]
    pop: Callable[[], Any]


class _Range:
    """One range, open from ``__enter__`` to ``__exit__``."""

    __slots__ = ("_name", "_nvtx", "_record")

    def __init__(self, nvtx: Nvtx | None, name: str) -> None:
        self._nvtx, self._name, self._record = nvtx, name, None

    def __enter__(self) -> None:
        if self._nvtx is not None:
            self._nvtx.push(self._name)
        # record_function dispatches two ops, whether somebody listens or not: under Nsight alone nobody does.
        if profiler._is_profiler_enabled:
            self._record = profiler.record_function(self._name)
            self._record.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._record is not None:
            self._record.__exit__(*error)
        if self._nvtx is not None:
            self._nvtx.pop()


OFF = nullcontext()
"""A context that does nothing, the same object each time: who finds it need not enter it."""
_open: Callable[[str], AbstractContextManager[Any]] | None = None


def annotate(name: str, number: int | None = None) -> AbstractContextManager[Any]:
    """Return a context that is a range of this name, or nothing while ranges are off.

    Args:
        name: without ``PREFIX``: "image.stem".
        number: put behind the name, so that a loop formats nothing while ranges are off.

    >>> with annotate("image.stage", 2):
    ...     x = stage(x)
    """
    if _open is None or torch.compiler.is_compiling():
        return OFF
    return _open(f"{PREFIX}{name}" if number is None else f"{PREFIX}{name}{number}")


def annotated(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that puts the whole of a function into a range; whether they are on is asked at each call."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with annotate(name):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def enabled(*, nvtx: bool = False) -> Iterator[None]:
    """Turn ranges on inside, in every thread of the process; ranges that are on already stay as they are.

    Args:
        nvtx: make NVTX ranges too, not for torch.profiler alone.

    Raises:
        ImportError: NVTX ranges are asked for, and there is neither the ``nvtx`` package nor a PyTorch with CUDA.
    """
    global _open
    before = _open
    if before is None or nvtx:
        _open = _opener(nvtx)
    try:
        yield
    finally:
        _open = before


def find_nvtx() -> Nvtx:
    """Return NVTX's functions: those of the ``nvtx`` package, in a domain of our own, or else PyTorch's.

    Raises:
        ImportError: there is neither; the message names the extra that brings the package.
    """
    try:
        package = require("nvtx", "profile")
    except ImportError:
        if not torch.backends.cuda.is_built():
            raise
        return Nvtx(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)
    return Nvtx(
        functools.partial(package.push_range, domain=DOMAIN), functools.partial(package.pop_range, domain=DOMAIN)
    )


def _opener(nvtx: bool) -> Callable[[str], AbstractContextManager[Any]]:
    return functools.partial(_Range, find_nvtx() if nvtx else None)


# Read once, unlike the other variables: to look at the environment costs more than a range that is off may.
match env.read("FLORENCE_FAST_NVTX"):
    case "1":
        _open = _opener(nvtx=True)
    case "0":
        _open = None
    case other:
        raise unknown("FLORENCE_FAST_NVTX", other, ("0", "1"))
