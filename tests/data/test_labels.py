"""Labels: recorded hashes, and which texts share one."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence_fast import native
from florence_fast.data.labels import text_label, text_labels


def test_recorded_values() -> None:
    assert text_label("red apple") == 4764450824584026067
    assert text_label("") == -1970711489451281740


@pytest.mark.parametrize("same", ["Red Apple", "  red\t apple\n", "RED\u00a0APPLE", "\uff52\uff45\uff44 apple"])
def test_texts_that_read_the_same_share_a_label(same: str) -> None:
    assert text_label(same) == text_label("red apple")


@pytest.mark.parametrize("other", ["red apples", "redapple", "green apple", "red-apple"])
def test_other_texts_do_not(other: str) -> None:
    assert text_label(other) != text_label("red apple")


def test_case_is_folded_and_not_only_lowered() -> None:
    assert text_label("STRASSE") == text_label("straße")


def test_labels_are_signed_64_bit() -> None:
    labels = [text_label(str(n)) for n in range(100)]
    assert min(labels) < 0 < max(labels)
    assert all(-(2**63) <= label < 2**63 for label in labels)


def test_anything_but_text_is_refused() -> None:
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        text_label(b"red apple")


@given(st.lists(st.text(alphabet=st.characters(max_codepoint=127)) | st.text(st.characters()), max_size=40))
def test_labels_of_many_are_those_of_each(texts: list[str]) -> None:
    wanted = [text_label(text) for text in texts]
    assert text_labels(texts).tolist() == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "extension", lambda: None)
        assert text_labels(texts).tolist() == wanted


def test_every_character_alone_and_between_others() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if code < 0x3000 or code % 97 == 0 or code == 0xDC80]
    texts = [text for character in characters for text in (character, f" A{character}b")]
    assert text_labels(texts, threads=2).tolist() == [text_label(text) for text in texts]


@pytest.mark.parametrize("blank", ["", " ", "\t\x1c "])
def test_texts_of_every_length_about_the_size_of_a_block(blank: str) -> None:
    texts = [blank + "Ab" * (size // 2) + "c" * (size % 2) + blank for size in range(400)]
    labels = text_labels(iter(texts))
    assert labels.dtype == np.int64
    assert labels.tolist() == [text_label(text) for text in texts]
    assert np.array_equal(text_labels(texts * 40, threads=2), np.tile(labels, 40))


def test_one_text_or_something_else_among_many_is_refused() -> None:
    with pytest.raises(TypeError, match="texts must be several texts, got a str"):
        text_labels("red apple")
    for texts in ([b"red apple"], ["red apple", None]):
        with pytest.raises(TypeError, match="text must be a str, got"):
            text_labels(texts)
