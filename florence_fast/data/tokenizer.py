"""CLIP's byte-pair tokenizer over the shipped merges (OpenAI CLIP, MIT), run by the ``tokenizers`` library.

Equal to open_clip's ``SimpleTokenizer`` of the same text. open_clip first repairs the text with ftfy; that is
done here too where ftfy is installed. Otherwise two parts of it are done: Unicode's NFC form, and halves of
characters (lone surrogates), which become U+FFFD.
"""

import contextlib
import gzip
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _BytePairTokenizer

try:
    from ftfy import fix_text as _repair
except ImportError:

    def _repair(text: str) -> str:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return unicodedata.normalize("NFC", text)


MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
START, END = "<start_of_text>", "<end_of_text>"

# One word, one digit or one run of signs; English endings are words of their own.
_WORDS = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
# A special token written out in a text counts as that token, unless signs stand before it (as in open_clip).
_SPECIALS = re.compile(rf"(?<![^\w\s])(?<!_)(?:{START}|{END})+")


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """CLIP's printable stand-in for each byte, in the order of their token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


@lru_cache(maxsize=1)
def byte_pairs() -> _BytePairTokenizer:
    """Build the tokenizer: 256 byte symbols, the same ending a word, 48,894 merges and two special tokens."""
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as lines:
        merges = [cast("tuple[str, str]", tuple(line.split())) for line in lines]
    symbols = list(_byte_symbols().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(merge) for merge in merges] + [START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    tokenizer = _BytePairTokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _clean(text: str) -> str:
    """Repair, undo HTML escapes (twice, as the web needs), collapse white space, lower the case."""
    text = _repair(text)
    # An escape of more digits than Python turns into a number is no escape of a character.
    with contextlib.suppress(ValueError):
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Turn texts into rows of token ids, as ``open_clip.get_tokenizer`` does.

    Args:
        context_length: ids a row, the two special tokens included; at least 2.

    Raises:
        ValueError: ``context_length`` is below 2.

    >>> Tokenizer(8)("a photo of a cat")
    tensor([[49406,   320,  1125,   539,   320,  2368, 49407,     0]])
    """

    vocab_size = 49408
    sot_token_id = 49406
    eot_token_id = 49407

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2, got {context_length}")
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Encode one text or several.

        Args:
            texts: a str, or a sequence of them.
            context_length: another row length for this call.

        Returns:
            int64 (B, context_length): start-of-text, the text, end-of-text, zeros. A text too long for its row
            is cut and still ends in end-of-text.

        Raises:
            TypeError: ``texts`` holds something else than str.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, ids in zip(rows, self._encode(texts), strict=True):
            ids = [self.sot_token_id, *ids[: length - 2], self.eot_token_id]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def encode(self, text: str) -> list[int]:
        """Encode one text without special tokens, padding or a limit."""
        return self._encode([text])[0]

    def decode(self, tokens: Iterable[int] | torch.Tensor) -> str:
        """Give back the text of one row of ids, up to its end-of-text; case and spacing stay normalised.

        Args:
            tokens: ids (N,), with or without special tokens.

        Raises:
            ValueError: ``tokens`` is not one row, or an id is no token.
        """
        ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else [int(token) for token in tokens]
        if any(isinstance(i, list) for i in ids):
            shape = tuple(cast(torch.Tensor, tokens).shape)
            raise ValueError(f"tokens must be one row of ids, got shape {shape}; decode row by row")
        if self.eot_token_id in ids:
            ids = ids[: ids.index(self.eot_token_id)]
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        text = bytearray()
        for i in ids:
            token = byte_pairs().id_to_token(i)
            if token is None:
                raise ValueError(f"tokens must be ids in [0, {self.vocab_size}), got {i}")
            if i != self.sot_token_id:
                word = token.removesuffix("</w>")
                text += bytes(byte_of[symbol] for symbol in word) + b" " * (word != token)
        return text.decode("utf-8", errors="replace").strip()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must be a str or a sequence of str, got a {type(text).__name__} in it")
        texts = [_clean(text) for text in texts]
        encoded = [e.ids for e in byte_pairs().encode_batch(texts, add_special_tokens=False)]
        for n, text in enumerate(texts):
            if START in text or END in text:
                encoded[n] = self._encode_with_specials(text)
        return encoded

    def _encode_with_specials(self, text: str) -> list[int]:
        """Encode a cleaned text in which special tokens are written out."""
        ids: list[int] = []
        end = 0
        for found in _SPECIALS.finditer(text):
            ids += byte_pairs().encode(text[end : found.start()], add_special_tokens=False).ids
            ids += [cast(int, byte_pairs().token_to_id(token)) for token in re.findall("<.*?>", found.group())]
            end = found.end()
        return ids + byte_pairs().encode(text[end:], add_special_tokens=False).ids
