"""Zero-shot classification: an image belongs to the class whose described name lies nearest (paper, section 3.1)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairSource
from florence_fast.data.prompts import fill
from florence_fast.errors import did_you_mean
from florence_fast.evaluate.features import ImageTransform, encode_images, evaluating, with_texts
from florence_fast.evaluate.ranking import ranks, recalls
from florence_fast.models.florence import Florence

Template = str | Callable[[str], str]
TEXTS_AT_ONCE = 256


def build_zero_shot_classifier(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Template],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """Build the weights of a linear classifier from class names, as open_clip does.

    Column k is the mean over templates t of the normalised features of t(name k), normalised again.

    Args:
        model: A dual encoder with ``encode_text``.
        tokenizer: From texts to tokens (B, L).
        classnames: K names.
        templates: Functions of a name, or strings with ``{}`` where the name goes.
        num_classes_per_batch: Names encoded at once; ``None`` takes all of them.
        device: Where the tokens are put; the model must be there.
        use_tqdm: Show a progress bar.

    Returns:
        (D, K) tensor: ``image_features @ classifier`` are the cosines.

    Raises:
        ValueError: ``classnames`` or ``templates`` is empty.

    >>> classifier = build_zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a photo of a {}."])
    >>> (image_features @ classifier).argmax(1)
    """
    if not classnames or not templates:
        raise ValueError(f"need at least one class name and one template, got {len(classnames)} and {len(templates)}")
    per_batch = num_classes_per_batch or len(classnames)
    columns = []
    with evaluating(model):
        for start in tqdm(range(0, len(classnames), per_batch), desc="classes", disable=not use_tqdm):
            names = classnames[start : start + per_batch]
            texts = [_describe(template, name) for name in names for template in templates]
            features = model.encode_text(tokenizer(texts).to(device), normalize=True)
            columns.append(F.normalize(features.unflatten(0, (len(names), len(templates))).mean(1), dim=-1).T)
    return torch.cat(columns, dim=1)


def zero_shot(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    source: PairSource,
    classnames: Sequence[str],
    templates: Sequence[Template] = ("{}",),
    *,
    transform: ImageTransform | None = None,
    batch_size: int = 256,
    precision: str = "auto",
    max_bad_share: float = 0.01,
    progress: bool = False,
) -> dict[str, float | int]:
    """Measure how often the right name is the first, or among the first 5 or 10, of all class names.

    An image's right class is the one whose name equals its text, capitals and white space aside. Pairs that cannot
    be read are named in the log and left out.

    Args:
        model: A dual encoder.
        tokenizer: From texts to tokens.
        source: Images with their names.
        classnames: K distinct names, all of which compete for every image.
        templates: See ``build_zero_shot_classifier``.
        transform: From a PIL image to a tensor; by default the model's own evaluation transform.
        batch_size: Images in one forward pass.
        precision: Of the image tower, a word of ``florence_fast.precision``.
        max_bad_share: Share of unreadable images or texts, 0 to 1, above which the call fails.
        progress: Show progress bars.

    Returns:
        ``{"top1", "top5", "top10"}`` as fractions, ``"classes"`` and ``"images"`` as counts.

    Raises:
        ValueError: Two class names are equal, or an image's name is no class.
        BadDataError: More than ``max_bad_share`` of the images or texts cannot be read.
    """
    source, names = with_texts(source, max_bad_share)
    targets = class_indices(names, classnames)
    encoded = encode_images(
        model,
        source,
        transform,
        batch_size=batch_size,
        precision=precision,
        max_bad_share=max_bad_share,
        progress=progress,
    )
    classifier_DK = build_zero_shot_classifier(
        model,
        tokenizer,
        classnames,
        templates,
        num_classes_per_batch=max(1, TEXTS_AT_ONCE // len(templates)),
        device=next(model.parameters()).device,
        use_tqdm=progress,
    )
    right = torch.tensor([[row, targets[index]] for row, index in enumerate(encoded.indices)], device="cpu")
    found = ranks(encoded.features, classifier_DK.T.float().cpu(), right)
    shares = recalls(found, at=(1, 5, 10))
    return {
        **{f"top{name[1:]}": share for name, share in shares.items()},
        "classes": len(classnames),
        "images": len(found),
    }


def class_indices(names: Sequence[str], classnames: Sequence[str]) -> list[int]:
    """Return the position of each of ``names`` in ``classnames``, compared as training labels are.

    Raises:
        ValueError: Two class names are equal, or a name is not among them.
    """
    index_of: dict[int, int] = {}
    for index, classname in enumerate(classnames):
        twin = index_of.setdefault(text_label(classname), index)
        if twin != index:
            raise ValueError(f"class names must differ, got {classnames[twin]!r} and {classname!r}")
    for name in names:
        if text_label(name) not in index_of:
            raise ValueError(f"{name!r} is none of the {len(classnames)} class names{did_you_mean(name, classnames)}")
    return [index_of[text_label(name)] for name in names]


def _describe(template: Template, name: str) -> str:
    return fill(template, name) if isinstance(template, str) else template(name)
