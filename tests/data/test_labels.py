"""Labels: recorded hashes, and which texts share one."""

import pytest

from florence_fast.data.labels import text_label


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
