"""JSON that others made is refused with a ValueError whatever is wrong with it; ours is read by every reader."""

import json
import math
import sys

import pytest

from florence_fast.strict_json import format_json, parse_json


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "c.json is JSON nested more than 100 deep"),
        ('{"a":' * 100_000, "c.json is JSON nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "c.json is JSON nested more than 100 deep"),
        ('{"lr": NaN}', "c.json is not JSON: it holds NaN"),
        ('{"lr": -Infinity}', "c.json is not JSON: it holds -Infinity"),
        ('{"lr": 1e999}', "c.json is not JSON: it holds 1e999, which is out of a float's range"),
        ("1" * 5000, "c.json is not JSON: Exceeds the limit"),
        ("", "c.json is not JSON: Expecting value"),
        ("{", "c.json is not JSON: Expecting property name"),
        (b"\xff{}", "c.json is not UTF-8"),
    ],
)
def test_what_is_not_json_is_a_value_error(text: str | bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_json(text, "c.json")


def test_json_is_read_as_it_stands() -> None:
    assert parse_json("\ufeff[1, 2.5, null]") == [1, 2.5, None]
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa4"}') == {"a": "ä"}
    assert parse_json("[" * 100 + "]" * 100) is not None
    assert parse_json(json.dumps([[]] * 500)) == [[]] * 500
    assert parse_json('"\\ud83d\\ude00 \\ud83d"') == "😀 \ud83d"


@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_written_holds_no_nan_and_can_be_encoded(indent: int | None) -> None:
    value = {
        "loss": math.nan,
        "rows": [1.5, -math.inf, (math.inf,)],
        "path": "caf\udce9 ü 😀.png",
        "least": sys.float_info.min,
        math.inf: 3,
    }
    text = format_json(value, indent=indent)
    assert ("ü" in text) == (indent is not None)
    assert parse_json(text.encode("utf-8")) == {
        "loss": None,
        "rows": [1.5, None, [None]],
        "path": "caf\udce9 ü 😀.png",
        "least": sys.float_info.min,
        "null": 3,
    }


def test_one_line_stays_one_line() -> None:
    assert len(format_json({"text": "a\u2028b\nc\x85d"}).splitlines()) == 1
