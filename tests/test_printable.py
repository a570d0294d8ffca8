"""What a terminal would obey, or no encoding has, is shown as an escape; everything else as it is."""

import pytest

from florence_fast.printable import has_half_character, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.png", "plain.png"),
        ("Größe 猫 👩‍👩‍👧 می‌خواهم\u00a0x", "Größe 猫 👩‍👩‍👧 می‌خواهم\u00a0x"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("a\nb\r\tc\u2028d\x85e", r"a\nb\r\tc\u2028d\x85e"),
        ("gpj.\u202eexe\u2066", r"gpj.\u202eexe\u2066"),
        ("caf\udce9.png", r"caf\xe9.png"),
        ("cut \ud83d", r"cut \ud83d"),
        (ValueError("x\x1by"), r"x\x1by"),
        ("a" * 3000, "a" * 2000 + "..."),
    ],
)
def test_printable(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode("utf-8")


def test_half_characters() -> None:
    assert has_half_character("cut \ud83d") and has_half_character("caf\udce9")
    assert not has_half_character("plain") and not has_half_character("😀 é")
