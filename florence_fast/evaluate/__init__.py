"""Evaluation of dual encoders: zero-shot classification, retrieval and search."""

from florence_fast.evaluate.features import EncodedImages, encode_images, encode_texts, with_texts
from florence_fast.evaluate.predict import probabilities
from florence_fast.evaluate.ranking import ranks, recalls
from florence_fast.evaluate.retrieval import retrieval
from florence_fast.evaluate.search import Hit, Hits, ImageFolder, ImageIndex, index_images, search
from florence_fast.evaluate.zero_shot import build_zero_shot_classifier, class_indices, zero_shot

__all__ = [
    "EncodedImages",
    "Hit",
    "Hits",
    "ImageFolder",
    "ImageIndex",
    "build_zero_shot_classifier",
    "class_indices",
    "encode_images",
    "encode_texts",
    "index_images",
    "probabilities",
    "ranks",
    "recalls",
    "retrieval",
    "search",
    "with_texts",
    "zero_shot",
]
