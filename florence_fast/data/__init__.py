"""Data: image-text pairs from files, the demo's images, tokenizer, transforms, augmentation, and the loader."""

from florence_fast.data.artists import artists_names, artists_test, artists_train
from florence_fast.data.augment import BatchAugment
from florence_fast.data.images import open_image
from florence_fast.data.labels import text_label, text_labels
from florence_fast.data.loader import BadDataError
from florence_fast.data.near_duplicates import NearDuplicateIndex, near_duplicate_groups, near_duplicates
from florence_fast.data.pair_loader import PairBatch, PairLoader
from florence_fast.data.pairs import Concat, PairSource, PairText, Subset, open_pairs
from florence_fast.data.perceptual_hash import dhash, phash
from florence_fast.data.prompts import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    TRAIN_TEMPLATES,
)
from florence_fast.data.tokenizer import Tokenizer
from florence_fast.data.transforms import image_transform
from florence_fast.data.workers import WorkerError

open_picture = open_image  # the name that it had first

__all__ = [
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "SIMPLE_IMAGENET_TEMPLATES",
    "TRAIN_TEMPLATES",
    "BadDataError",
    "BatchAugment",
    "Concat",
    "NearDuplicateIndex",
    "PairBatch",
    "PairLoader",
    "PairSource",
    "PairText",
    "Subset",
    "Tokenizer",
    "WorkerError",
    "artists_names",
    "artists_test",
    "artists_train",
    "dhash",
    "image_transform",
    "near_duplicate_groups",
    "near_duplicates",
    "open_image",
    "open_pairs",
    "open_picture",
    "phash",
    "text_label",
    "text_labels",
]
