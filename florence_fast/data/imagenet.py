"""ImageNet's class folders: WordNet ids such as n01440764, and the names that CLIP's list gives them."""

import re
from functools import lru_cache

from florence_fast.data.prompts import IMAGENET_CLASSNAMES, IMAGENET_WNIDS

_WNID = re.compile(r"n\d{8}")


def is_wnid(name: str) -> bool:
    """Whether a folder's name is a WordNet id."""
    return _WNID.fullmatch(name) is not None


def imagenet_name(wnid: str) -> str | None:
    """Return the name of one of ImageNet's 1,000 classes, or None for another id.

    >>> imagenet_name("n01440764")
    'tench'
    """
    return _names().get(wnid)


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    return dict(zip(IMAGENET_WNIDS, IMAGENET_CLASSNAMES, strict=True))
