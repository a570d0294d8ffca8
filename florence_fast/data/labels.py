"""Which pairs say the same: the label y of a description (Florence, section 2.2)."""

import hashlib
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from florence_fast import native
from florence_fast.data.threads import number_of_threads


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
    digest = hashlib.blake2b(_normalised(text), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def text_labels(texts: Iterable[str], *, threads: int | None = None) -> np.ndarray:
    """Hash many descriptions: text_label of each, natively where the extension is there.

    On one thread it took 0.33 us for a caption of ten words and 0.20 us for a name, where text_label takes 1.22 and
    0.85 without its cache; with a letter outside ASCII, which Python normalises, 1.12 against 1.51. hashlib is in C
    already: what is saved is the objects around it.

    Args:
        texts: the descriptions.
        threads: None for torch's number; the result does not depend on it.

    Returns:
        int64 (N,).

    Raises:
        TypeError: one of ``texts`` is not a str.

    >>> text_labels(["Red  Apple", "red apple"]).tolist() == [text_label("red apple")] * 2
    True
    """
    threads, module = number_of_threads(threads), native.extension()
    if isinstance(texts, str):
        raise TypeError("texts must be several texts, got a str: text_label takes one")
    if module:
        return module.text_labels(threads, tuple(texts), _normalised)
    return np.array([text_label.__wrapped__(text) for text in texts], dtype=np.int64)


def _normalised(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode("utf-8", "surrogatepass")
