"""Checks of plain values. Every message has the name, what was wanted and what was given."""

import math
import numbers
from collections.abc import Sequence
from typing import cast


def whole(name: str, value: object, low: int = 1, high: int = 2**63 - 1) -> int:
    """Return ``value`` as an int.

    Raises:
        ValueError: it is not a whole number from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {_shown(value)}")
    return int(_in_range(name, value, low, high))


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value``, a finite number.

    Raises:
        ValueError: it is not a finite number from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {_shown(value)}")
    return cast(float, _in_range(name, value, low, high))


def positive(name: str, value: object, high: float = math.inf) -> float:
    """Return ``value``, a finite number above zero.

    Raises:
        ValueError: it is not a finite number above 0 and up to ``high``.
    """
    if number(name, value, high=high) <= 0:
        raise ValueError(f"{name} must be positive, got {_shown(value)}")
    return cast(float, value)


def sequence(name: str, value: object) -> tuple:
    """Return ``value``, a list or a tuple, as a tuple.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list, got {_shown(value)}")
    return tuple(value)


def _in_range(name: str, value, low, high):
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {_shown(value)}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """The value in a message: its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
