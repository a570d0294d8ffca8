"""Evaluators that run during training. Metrics carry open_clip's names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from florence_fast.data.class_folders import ClassFolders
from florence_fast.data.imagenet import imagenet_name, is_wnid
from florence_fast.data.pairs import PairSource
from florence_fast.data.prompts import IMAGENET_WNIDS, OPENAI_IMAGENET_TEMPLATES
from florence_fast.evaluate.classification import accuracy
from florence_fast.evaluate.features import device_of, encode_images
from florence_fast.evaluate.retrieval import retrieval
from florence_fast.evaluate.zero_shot import TEXTS_AT_ONCE, build_zero_shot_classifier
from florence_fast.models.florence import Florence

Tokenizer = Callable[[list[str]], Tensor]


class RetrievalEvaluator:
    """Recall at 1, 5 and 10 in both directions on held-out pairs: "image_to_text_R@1" and so on."""

    def __init__(self, tokenizer: Tokenizer, source: PairSource) -> None:
        self.tokenizer, self.source = tokenizer, source

    def run(self, model: nn.Module) -> dict[str, float]:
        """Return the recalls as fractions."""
        found: dict[str, Any] = retrieval(cast(Florence, model), self.tokenizer, self.source)
        directions = ("image_to_text", "text_to_image")
        return {f"{way}_R@{at[1:]}": share for way in directions for at, share in found[way].items()}


class ZeroShotEvaluator:
    """Zero-shot accuracy on class folders: "imagenet-zeroshot-val-top1", "-top5" and "-mean-per-class".

    Args:
        tokenizer: of the model.
        folder: one folder a class. WordNet ids stand for ImageNet's 1,000 classes, which all compete; other folders are
            classes by their names.
        templates: sentences with ``{}`` where the name goes; by default CLIP's 80 for ImageNet.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `ClassFolders`.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: str | Path, templates: Sequence[str] = OPENAI_IMAGENET_TEMPLATES
    ) -> None:
        source = ClassFolders(folder)
        if all(map(is_wnid, source.classes)):
            source = ClassFolders(folder, IMAGENET_WNIDS)
        self.tokenizer, self.source, self.templates = tokenizer, source, templates
        self.names = [imagenet_name(name) or " ".join(name.replace("_", " ").split()) for name in source.classes]

    def run(self, model: nn.Module) -> dict[str, float]:
        """Return the shares as fractions."""
        dual = cast(Florence, model)
        encoded = encode_images(dual, self.source)
        per_batch = max(1, TEXTS_AT_ONCE // len(self.templates))
        settings = {"num_classes_per_batch": per_batch, "device": device_of(model)}
        classifier_DK = build_zero_shot_classifier(dual, self.tokenizer, self.names, self.templates, **settings)
        logits = encoded.features @ classifier_DK.float().cpu()
        labels = torch.tensor(self.source.labels, device="cpu")[encoded.indices]
        figures = accuracy(logits.topk(min(5, logits.shape[1])).indices, labels, len(self.names))
        names = {"top1": "top1", "top5": "top5", "mean_per_class": "mean-per-class"}
        return {f"imagenet-zeroshot-val-{names[key]}": value for key, value in figures.items() if key in names}
