"""Zero-shot classification: the classifier against open_clip's definition, the figures on colours."""

import pytest
import torch

from florence_fast.evaluate import build_zero_shot_classifier, zero_shot
from florence_fast.evaluate.zero_shot import class_indices
from tests.evaluate.stand_ins import COLOURS, ColourImages, ColourModel, tokenizer, transform


@pytest.mark.parametrize("num_classes_per_batch", [1, 3, None])
def test_a_column_is_the_normalised_mean_of_normalised_templates(num_classes_per_batch):
    templates = ["{}", lambda name: f"{name} and red" if name == "x" else "red"]
    classifier = build_zero_shot_classifier(
        ColourModel(), tokenizer, list(COLOURS), templates, num_classes_per_batch=num_classes_per_batch
    )
    red = torch.tensor([1.0, 0, 0])
    for column, colour in zip(classifier.T, COLOURS.values(), strict=True):
        own = torch.tensor(colour).float()
        expected = (own / own.norm() + red) / 2
        torch.testing.assert_close(column, expected / expected.norm())


def test_figures_are_fractions_of_the_images_that_were_read():
    source = ColourImages(["red", "green", "blue", "yellow"], ["Red ", "green", "yellow", "yellow"])
    result = zero_shot(ColourModel(), tokenizer, source, list(COLOURS), transform=transform)
    # The third is blue and called yellow: of its wrong names blue is nearer, and red and green tie with yellow.
    assert result == {"top1": 0.75, "top5": 1.0, "top10": 1.0, "classes": 4, "images": 4}


def test_a_name_that_is_no_class_gives_the_nearest_one():
    with pytest.raises(ValueError, match=r"'gren' is none of the 4 class names \(did you mean 'green'\?\)"):
        class_indices(["gren"], list(COLOURS))


def test_equal_class_names_are_refused():
    with pytest.raises(ValueError, match=r"class names must differ, got 'red' and 'Red'"):
        class_indices([], ["red", "Red"])


def test_no_class_or_no_template_is_refused():
    with pytest.raises(ValueError, match="at least one class name and one template, got 0 and 1"):
        build_zero_shot_classifier(ColourModel(), tokenizer, [], ["{}"])
