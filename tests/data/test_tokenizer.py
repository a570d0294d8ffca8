"""The tokenizer against ids that open_clip 3.3.0's own tokenizer gave for hard strings, and its rows and errors."""

import json
from pathlib import Path

import pytest
import torch

from florence_fast.data.tokenizer import Tokenizer

# Recorded with and without ftfy; only strings of which both give the same are here.
OPEN_CLIP_IDS = json.loads(Path(__file__).with_name("open_clip_ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", OPEN_CLIP_IDS, ids=lambda text: ascii(text[:24]))
def test_ids_equal_those_of_open_clip(text: str) -> None:
    row = Tokenizer(77)(text)[0].tolist()
    ids = OPEN_CLIP_IDS[text]
    assert row == ids + [0] * (77 - len(ids))


def test_ids_equal_those_of_open_clip_when_encoded_together() -> None:
    rows = Tokenizer(77)(list(OPEN_CLIP_IDS))
    assert [row[: len(ids)] for row, ids in zip(rows.tolist(), OPEN_CLIP_IDS.values(), strict=True)] == list(
        OPEN_CLIP_IDS.values()
    )


def test_a_long_text_is_cut_and_still_ends() -> None:
    tokenizer = Tokenizer(6)
    assert tokenizer("a photo of a cat").tolist() == [[49406, 320, 1125, 539, 320, 49407]]
    assert tokenizer("a photo of a cat", context_length=4).tolist() == [[49406, 320, 1125, 49407]]


def test_rows_have_the_shape_and_type_of_open_clip() -> None:
    rows = Tokenizer(16)(["a", "b", "c"])
    assert rows.shape == (3, 16) and rows.dtype == torch.int64
    assert Tokenizer(16)([]).shape == (0, 16)
    assert (Tokenizer.vocab_size, Tokenizer.sot_token_id, Tokenizer.eot_token_id) == (49408, 49406, 49407)


@pytest.mark.parametrize("text", ["cut \ud83d", "\ude00\ud83d twice", "caf\udce9", "&#" + "1" * 5000 + ";", "\x00\x1b"])
def test_no_text_is_too_dirty(text: str) -> None:
    row = Tokenizer(16)([text, "clean"])[0].tolist()
    assert row[0] == 49406 and 49407 in row
    halves = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    assert Tokenizer(16)(halves)[0].tolist() == row


def test_two_halves_of_a_character_are_one() -> None:
    assert Tokenizer(8)("\ud83d\ude00").tolist() == Tokenizer(8)("\U0001f600").tolist()


@pytest.mark.parametrize("text", ["a photo of a cat", "it 's 4 , naïve café ! 😀", "日本語 한국어"])
def test_decode_gives_the_text_back(text: str) -> None:
    tokenizer = Tokenizer(40)
    assert tokenizer.decode(tokenizer(text)[0]) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length must be at least 2, got 1"):
        Tokenizer(1)
    with pytest.raises(TypeError, match="got a int in it"):
        Tokenizer(8)(["a", 3])
    with pytest.raises(ValueError, match=r"one row of ids, got shape \(1, 8\)"):
        Tokenizer(8).decode(Tokenizer(8)("a"))
    with pytest.raises(ValueError, match=r"ids in \[0, 49408\), got 49408"):
        Tokenizer(8).decode([49408])
