"""Templates and class names as CLIP has them, and how a pair's text is varied."""

import pytest

from florence_fast.data.pairs import PairText
from florence_fast.data.prompts import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    PAPER_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    TRAIN_TEMPLATES,
    draw_text,
)

DOG = PairText("Dog Face", "Puppy", ["animal", "pet"])


def test_zero_shot_metadata_is_clips() -> None:
    assert (len(OPENAI_IMAGENET_TEMPLATES), len(SIMPLE_IMAGENET_TEMPLATES), len(IMAGENET_CLASSNAMES)) == (80, 7, 1000)
    assert OPENAI_IMAGENET_TEMPLATES[0] == "a bad photo of a {}."
    assert set(SIMPLE_IMAGENET_TEMPLATES) <= set(OPENAI_IMAGENET_TEMPLATES)
    assert IMAGENET_CLASSNAMES[0] == "tench" and IMAGENET_CLASSNAMES[-1] == "toilet paper"


@pytest.mark.parametrize("template", OPENAI_IMAGENET_TEMPLATES + SIMPLE_IMAGENET_TEMPLATES + TRAIN_TEMPLATES)
def test_a_template_has_one_blank_and_may_be_called_or_formatted(template: str) -> None:
    assert template.count("{}") == 1
    assert template("c{t") == template.format("c{t") == template.replace("{}", "c{t")


def test_training_templates_begin_with_the_papers() -> None:
    assert TRAIN_TEMPLATES[:2] == PAPER_TEMPLATES == ("a photo of the {}", "a cropped photo of {}")


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((0.9, 0.0, 0.9, 0.0), ("dog face", "dog face")),
        ((0.1, 0.0, 0.9, 0.0), ("animal", "animal")),
        ((0.1, 0.3, 0.9, 0.0), ("pet", "pet")),
        ((0.1, 0.5, 0.9, 0.0), ("puppy", "puppy")),
        ((0.1, 0.99, 0.9, 0.0), ("puppy", "puppy")),
        ((0.9, 0.0, 0.1, 0.0), ("dog face", "a photo of the dog face")),
        ((0.1, 0.0, 0.1, 0.2), ("animal", "a cropped photo of animal")),
    ],
)
def test_draws_choose_name_and_template(draws: tuple[float, ...], expected: tuple[str, str]) -> None:
    assert draw_text(DOG, draws, keyword_prob=0.3, template_prob=0.5) == expected


def test_a_pair_without_other_names_keeps_its_text() -> None:
    assert draw_text(PairText("Dog"), (0.0, 0.99, 0.9, 0.0), 1.0, 0.5) == ("dog", "dog")
    assert draw_text(PairText("Dog", "Puppy"), (0.0, 0.0, 0.9, 0.0), 1.0, 0.5) == ("puppy", "puppy")
