"""Prompt templates: sentences with one blank that turn a word into a caption.

Training draws from ``TRAIN_TEMPLATES`` (the paper's two, section 2.2, and a few of ours). Zero-shot evaluation
averages over ``OPENAI_IMAGENET_TEMPLATES`` (80) or ``SIMPLE_IMAGENET_TEMPLATES`` (7); these and the 1,000
``IMAGENET_CLASSNAMES`` are CLIP's, kept in zero_shot_metadata.json.
"""

from collections.abc import Sequence
from pathlib import Path

from florence_fast.data.pairs import PairText
from florence_fast.text_files import read_json

BLANK = "{}"


def fill(template: str, text: str) -> str:
    """Put ``text`` into the blanks ``{}`` of a template; other braces are plain characters.

    Raises:
        ValueError: ``template`` has no blank.
    """
    if BLANK not in template:
        raise ValueError(f"a template must hold {BLANK}, which stands for the text, got {template!r}")
    return template.replace(BLANK, text)


class Template(str):
    """A template that may be formatted, as a str, or called with the name, as open_clip's templates are.

    >>> Template("a photo of a {}.")("cat")
    'a photo of a cat.'
    """

    __slots__ = ()

    def __call__(self, name: str) -> str:
        """Put ``name`` into the blank."""
        return self.format(name)


def _templates(sentences: list[str]) -> tuple[Template, ...]:
    return tuple(Template(sentence) for sentence in sentences)


_METADATA = read_json(Path(__file__).with_name("zero_shot_metadata.json"))

PAPER_TEMPLATES = _templates(["a photo of the {}", "a cropped photo of {}"])
TRAIN_TEMPLATES = PAPER_TEMPLATES + _templates(
    ["a picture of a {}", "an icon of {}", "a drawing of the {}", "an image of {}"]
)
OPENAI_IMAGENET_TEMPLATES = _templates(_METADATA["openai_imagenet_templates"])
SIMPLE_IMAGENET_TEMPLATES = _templates(_METADATA["simple_imagenet_templates"])
IMAGENET_CLASSNAMES: tuple[str, ...] = tuple(_METADATA["imagenet_classnames"])
# The classes' WordNet ids, which are the names of ImageNet's folders, in the same order.
IMAGENET_WNIDS: tuple[str, ...] = tuple(_METADATA["imagenet_wnids"])


def draw_text(pair: PairText, draws: Sequence[float], keyword_prob: float, template_prob: float) -> tuple[str, str]:
    """Vary the text of a pair, as the first stage of pretraining does: another name, then a sentence around it.

    Args:
        pair: the text, short name and keywords of an image.
        draws: four numbers in [0, 1): whether and which name, whether and which template.
        keyword_prob: how often the short name or a keyword stands in for the text, where there are any. The short
            name counts as two keywords.
        template_prob: how often a template of ``TRAIN_TEMPLATES`` is put around it.

    Returns:
        The lower-cased words that were drawn, which the label is taken of, and the caption made of them.
    """
    names = [*pair.keywords, *[pair.short_name] * 2] if pair.short_name else pair.keywords
    drawn = names[int(draws[1] * len(names))] if names and draws[0] < keyword_prob else pair.text
    drawn = drawn.lower()
    if draws[2] >= template_prob:
        return drawn, drawn
    return drawn, TRAIN_TEMPLATES[int(draws[3] * len(TRAIN_TEMPLATES))](drawn)
