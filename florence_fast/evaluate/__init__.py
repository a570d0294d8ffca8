"""Evaluation: how well the dual encoder names pictures, finds them, and is found by them."""

from florence_fast.evaluate.features import EncodedImages, encode_images, encode_texts, with_texts
from florence_fast.evaluate.predict import probabilities
from florence_fast.evaluate.ranking import ranks, recalls
from florence_fast.evaluate.retrieval import retrieval
from florence_fast.evaluate.search import Hit, Hits, PictureFolder, PictureIndex, index_pictures, search
from florence_fast.evaluate.zero_shot import build_zero_shot_classifier, class_indices, zero_shot

__all__ = [
    "EncodedImages",
    "Hit",
    "Hits",
    "PictureFolder",
    "PictureIndex",
    "build_zero_shot_classifier",
    "class_indices",
    "encode_images",
    "encode_texts",
    "index_pictures",
    "probabilities",
    "ranks",
    "recalls",
    "retrieval",
    "search",
    "with_texts",
    "zero_shot",
]
