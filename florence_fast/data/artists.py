"""The demo's data: emoji by seven artists with their names and Unicode's keywords.

Six artists are for training. The seventh, whose drawings no training run sees, tests whether the model learned the
names or the drawings. The images are shipped; scripts/render_artists.py makes them again, NOTICE credits them.
"""

from functools import lru_cache
from pathlib import Path

from florence_fast.data.pairs import PairSource, Subset
from florence_fast.data.shards import TarPairs

FOLDER = Path(__file__).with_name("artists")
TRAIN_ARTISTS = ("emojione", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "noto", "noto-v1")
TEST_ARTIST = "twemoji"


@lru_cache(maxsize=1)
def artists_train() -> PairSource:
    """Images of the six training artists: 8,666 pairs, 64 x 64 pixels."""
    return TarPairs([FOLDER / f"{artist}.tar.gz" for artist in TRAIN_ARTISTS])


@lru_cache(maxsize=1)
def artists_test() -> PairSource:
    """Images of the held-out artist whose names occur in training: 1,696 pairs."""
    known = set(artists_names())
    held_out = TarPairs([FOLDER / f"{TEST_ARTIST}.tar.gz"])
    return Subset(held_out, [index for index in range(len(held_out)) if held_out.texts(index).text in known])


def artists_names() -> list[str]:
    """The 2,660 names of the training images, sorted: the classes of the zero-shot test."""
    source = artists_train()
    return sorted({source.texts(index).text for index in range(len(source))})
