"""Make names and captions from files safe to print in a terminal, a log or a page."""

import unicodedata

# Control and format characters, halves of characters, and separators of lines.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Joiners, which emoji, Persian and the scripts of India need.
_KEPT = frozenset("\u200c\u200d")


def printable(text: object, limit: int = 2000) -> str:
    r"""Return ``str(text)`` on one line, with every character escaped that could act on a terminal or not be encoded.

    Escaped are control characters (the escape sequences of terminals begin with one), format characters that turn
    the direction of text, separators of lines, and lone surrogates. A byte of a file name that is not UTF-8 is shown
    as that byte. Emoji, letters of any script and blanks stay.

    Args:
        text: what is to be shown.
        limit: characters of ``text`` that are shown; "..." stands for the rest.

    >>> print(printable("caf\udce9\x1b[2J.png"))
    caf\xe9\x1b[2J.png
    """
    text = str(text)
    if len(text) > limit:
        text = text[:limit] + "..."
    return text if text.isprintable() else "".join(map(_shown, text))


def has_half_character(text: str) -> bool:
    """Whether ``text`` holds a lone surrogate, which no encoding has: half an emoji, or a name that is not UTF-8."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED or character in _KEPT:
        return character
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
