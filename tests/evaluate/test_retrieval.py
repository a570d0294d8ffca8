"""Retrieval with several right answers in either direction."""

import pytest

from florence_fast.evaluate import retrieval
from tests.evaluate.stand_ins import ColourImages, ColourModel, tokenizer, transform

PERFECT = {"r1": 1.0, "r5": 1.0, "r10": 1.0}


def run(source: ColourImages, **options) -> dict:
    return retrieval(ColourModel(), tokenizer, source, transform=transform, batch_size=2, **options)


def test_equal_texts_are_one_text_with_several_right_images():
    result = run(
        ColourImages(["red", "green", "red", "blue"], ["red", "green", " RED", "blue"]), merge_equal_images=False
    )
    assert (result["images"], result["texts"]) == (4, 3)
    assert result["image_to_text"] == PERFECT and result["text_to_image"] == PERFECT


def test_equal_pixels_are_one_image_with_several_right_texts():
    result = run(ColourImages(["red", "green", "red"], ["red", "green", "a red thing"]))
    assert (result["images"], result["texts"]) == (2, 3)
    assert result["image_to_text"] == PERFECT and result["text_to_image"] == PERFECT


def test_unmerged_equal_images_compete_and_ties_count_against_the_model():
    source = ColourImages(["red", "green", "red"], ["red", "green", "a red thing"])
    result = run(source, merge_equal_images=False)
    assert result["images"] == 3
    assert result["text_to_image"]["r1"] == pytest.approx(1 / 3)


def test_a_wrong_pair_is_a_miss_in_both_directions():
    result = run(ColourImages(["red", "green", "blue"], ["red", "blue", "green"]))
    assert result["image_to_text"]["r1"] == result["text_to_image"]["r1"] == pytest.approx(1 / 3)


def test_the_template_is_what_is_asked():
    result = run(ColourImages(["red", "green"]), template="red, not {}")
    assert result["image_to_text"]["r1"] == 0.0
