"""The words in which wrong names and missing packages are refused, the same everywhere."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


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
