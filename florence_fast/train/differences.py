"""Compare two descriptions of a run: settings, models, data, environments."""

from collections.abc import Mapping
from typing import Any

ABSENT = "absent"


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Return the entries of nested mappings and sequences by dotted names; sequences count from 0.

    >>> flat({"lr": 0.1, "stages": [{"steps": 5}]})
    {'lr': 0.1, 'stages.0.steps': 5}
    """
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        return {name: values}
    return {
        key: value
        for part, inner in items
        for key, value in flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, value in ``one``, value in ``other``) of every differing entry, in the order of the names."""
    one, other = flat(one), flat(other)
    names = sorted(one.keys() | other.keys())
    pairs = ((name, one.get(name, ABSENT), other.get(name, ABSENT)) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]
