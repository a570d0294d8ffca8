"""Which pairs say the same: the label y of a description (Florence, section 2.2)."""

import hashlib
import unicodedata
from functools import lru_cache


@lru_cache(maxsize=1 << 17)
def text_label(text: str) -> int:
    """Hash a description to a signed 64-bit label; two descriptions that read the same share it.

    y = blake2b-64(text) after NFKC, case folding and white space collapsed to single blanks. The paper keeps a
    text hash table: identical descriptions, and only identical ones, are positives of each other. The label is
    taken of the text as drawn for the pair (a name, or one of its keywords), before any prompt template.

    Args:
        text: the description.

    Returns:
        An int in [-2**63, 2**63), the same on every machine.

    Raises:
        TypeError: ``text`` is not a str.

    >>> text_label("Red  Apple") == text_label("red apple")
    True
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
