"""Strict JSON: untrusted files are checked, and output has no NaN, no infinity and no lone surrogates."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

BYTE_ORDER_MARK = "\ufeff"
MOST_NESTED = 100


def parse_json(text: str | bytes, what: str = "the text") -> Any:
    """Parse JSON; a byte-order mark before it is passed over.

    Args:
        text: the JSON, as a str or as UTF-8 bytes.
        what: what the error message calls the text: a path, for instance.

    Raises:
        ValueError: ``text`` is not UTF-8 or not JSON, is nested more than 100 deep, or holds NaN, an infinity or a
            number that a float cannot hold.

    >>> parse_json('{"lr": NaN}', "config.json")
    ValueError: config.json is not JSON: it holds NaN
    """
    try:
        text = (text if isinstance(text, str) else text.decode("utf-8")).removeprefix(BYTE_ORDER_MARK)
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > MOST_NESTED and _is_deeper([value], MOST_NESTED + 1):
            raise RecursionError
        return value
    except RecursionError:  # the parser's own, or what code that walks through the value would meet
        raise ValueError(f"{what} is JSON nested more than {MOST_NESTED} deep, which nothing here is") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def format_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    r"""Format a value as JSON.

    NaN and infinities, which JSON lacks, become null. A lone surrogate, as file names that are not UTF-8 have them,
    becomes JSON's escape of it: ``\udce9``, which Python reads back as the same name. Without ``indent`` the result
    is one line of ASCII; with it, letters stay as they are.

    Raises:
        TypeError: ``value`` holds something that JSON cannot express.
    """
    text = json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=indent is None, allow_nan=False)
    # Python's escape of a surrogate is spelled as JSON's is, and only strings can hold one.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    """Copy ``value`` with None in place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_finite(key) if isinstance(key, float) else key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_deeper(value: list | dict, most: int) -> bool:
    """Whether lists and dicts are nested more than ``most`` deep, found without recursion."""
    level = [value]
    for _ in range(most):
        inner = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"it holds {digits[:40]}, which is out of a float's range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float)
