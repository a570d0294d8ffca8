"""Settings dataclasses: frozen, with accepted values per field, for checks, JSON and command-line flags."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar, get_args

from florence_fast.errors import did_you_mean, require_count, require_number, unknown

S = TypeVar("S", bound="Settings")
_DESCRIBED = re.compile(r" {8}(\w+(?:, \w+)*): (.*)")


def count(default: int | None, at_least: int = 1, at_most: int | None = None) -> Any:
    """Declare a whole number within a range."""
    check = partial(require_count, at_least=at_least, at_most=at_most)
    return field(default=default, metadata={"check": check, "min": at_least, "max": at_most})


def number(default: float | None, wanted: str, within: Callable[[float], bool] = lambda _: True) -> Any:
    """Declare a finite number; ``wanted`` completes "<name> must ..." for one that is not ``within`` its range."""
    return field(default=default, metadata={"check": partial(require_number, wanted=wanted, within=within)})


def word(default: str | None, known: Sequence[str]) -> Any:
    """Declare one of some words."""
    return field(default=default, metadata={"check": partial(_require_word, known=known), "known": tuple(known)})


def _require_word(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown(name, value, known)


def require_bool(name: str, value: object) -> None:
    """Refuse what is not True or False, such as the word "false" of a JSON file, which would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def refuse_unknown_keys(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse what is not a mapping from fields of the dataclass ``cls``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be given as names with values, got {values!r}")
    known = [declared.name for declared in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting {key!r}{did_you_mean(str(key), known)}")


def is_optional(declared: Field) -> bool:
    """Say whether a field accepts None."""
    return type(None) in get_args(declared.type)


@dataclass(frozen=True)
class Settings:
    """Base of every configuration. Fields are declared with `count`, `number` and `word`, or as a plain bool.

    Raises:
        ValueError: a value is out of its range, or a word is unknown.
    """

    def __post_init__(self) -> None:
        for declared in fields(self):
            name, value = declared.name, getattr(self, declared.name)
            if value is None and is_optional(declared):
                continue
            if declared.type in (bool, bool | None):
                require_bool(name, value)
            elif check := declared.metadata.get("check"):
                check(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, from which `from_dict` makes an equal config."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
        """Make a config from what `to_dict` returned.

        Raises:
            ValueError: a key is unknown (the nearest known one is named), or a value is out of its range.
        """
        refuse_unknown_keys(cls, values)
        return cls(**values)

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Return what the Args sections of the docstring, and of those above it, say about each field, on one line."""
        found: dict[str, str] = {}
        names: list[str] = []
        documents = [base.__dict__.get("__doc__") or "" for base in reversed(cls.__mro__)]
        for line in "\n".join(documents).splitlines():
            if match := _DESCRIBED.fullmatch(line):
                names = match[1].split(", ")
                found |= dict.fromkeys(names, match[2])
            elif names and line.startswith(" " * 12):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
        known = {declared.name for declared in fields(cls)}
        return {name: text for name, text in found.items() if name in known}
