"""Shared wording of the errors for wrong names, wrong numbers and missing packages."""

import difflib
import importlib
import math
import numbers
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import cast


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest of ``choices``, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """Build the error for a name that is not one of ``choices``; the caller raises it.

    >>> raise unknown("model", "florence_nanoo", ["florence_nano"])
    ValueError: unknown model 'florence_nanoo' (did you mean 'florence_nano'?); known: florence_nano
    """
    names = list(choices)
    shown = ", ".join(names[:12]) + (f", ... {len(names) - 12} more" if len(names) > 12 else "")
    return ValueError(f"unknown {kind} {name!r}{did_you_mean(str(name), names)}; known: {shown}")


def require_number(name: str, value: object, wanted: str, within: Callable[[float], bool] = lambda _: True) -> None:
    """Refuse what is not a finite number within a range; NaN, Inf, bool and str are refused whatever the range.

    Args:
        name: of the argument.
        value: what was given.
        wanted: what is said behind "must".
        within: the range.

    Raises:
        ValueError: the message holds ``name``, ``wanted`` and ``value``.

    >>> require_number("weight_decay", float("nan"), "not be negative", lambda decay: decay >= 0)
    ValueError: weight_decay must not be negative, got nan
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and within(cast(float, value))):
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def require_count(name: str, value: object, at_least: int, at_most: int | None = None) -> None:
    """Refuse what is not a whole number of at least ``at_least``.

    Raises:
        ValueError: ``value`` is none, or exceeds ``at_most``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be a whole number of at most {at_most}, got {value!r}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of ours installs it.

    Raises:
        ImportError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module!r} is needed for this and is not installed; it comes with the extra {extra!r}: "
            f"pip install 'florence_fast[{extra}]'"
        ) from error
