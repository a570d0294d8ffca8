"""Put the spaces back into names that an artist wrote as one word: 'ballotboxwithcheck' is 'ballot box with check'.

A name takes the spelling that another artist, Unicode's short name or its formal name has for the same letters.
Otherwise it is cut into the most frequent words of all of these; what cannot be cut whole stays as it is.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

SYMBOLS = [*range(0x2000, 0x2C00), *range(0x1F000, 0x1FB00)]  # blocks of signs and pictographs
SHORT_WORDS = frozenset(
    ["ab", "cl", "do", "id", "in", "it", "m", "no", "of", "oh", "ok", "on", "p", "ng", "sa", "to", "up", "vs", "x"]
)  # others are no words
LETTERED = ("regional indicator", "negative squared latin capital")  # kinds of signs, one for each letter
# What neither artists nor Unicode write, and the artist's slips.
MORE_WORDS = [
    "acorn",
    "bicep",
    "bicyclist",
    "britain",
    "chili",
    "congratulation",
    "descend",
    "flex",
    "great",
    "guy",
    "hand",
    "held",
    "italian",
    "knob",
    "meridian",
    "missing",
    "potable",
    "smiley",
    "spanish",
    "spurting",
    "splash",
    "squint",
    "storm",
    "system",
    "wallet",
    "whale",
]
SLIPS = {
    "asterix": "asterisk",
    "ballott": "ballot",
    "baloon": "balloon",
    "bibbous": "gibbous",
    "captial": "capital",
    "casette": "cassette",
    "dissapointed": "disappointed",
    "exclaimation": "exclamation",
    "hampster": "hamster",
    "manltepiece": "mantelpiece",
    "perservere": "persevere",
    "saggitarius": "sagittarius",
    "toyko": "tokyo",
    "trisngle": "triangle",
}


def compact(name: str) -> str:
    """Letters and digits alone: 'alarm-clock', 'Alarm clock' and 'alarmclock' meet here."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower())


def plain_words(name: str) -> str:
    """Lower case, and blanks in place of hyphens and of other signs."""
    plain = unicodedata.normalize("NFKD", name.replace("’", "")).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", plain.lower()))


class Speller:
    """Spell glued names.

    Args:
        artists: names of the artists that write them in words.
        unicode_names: Unicode's short names and keywords.

    >>> Speller(["green apple"], ["alarm clock"]).spell("greenapple")
    'green apple'
    """

    def __init__(self, artists: Iterable[str], unicode_names: Iterable[str]) -> None:
        formal = [unicodedata.name(chr(point), "") for point in SYMBOLS]
        lettered = [f"{kind} {letter}" for kind in LETTERED for letter in string.ascii_lowercase]
        names = [plain_words(name) for name in (*artists, *unicode_names, *formal, *lettered)]
        self.spelling = {compact(name): name for name in reversed(names) if name}
        self.counts = Counter(word for name in (*names, *MORE_WORDS) for word in name.split())
        self.total = sum(self.counts.values())

    def spell(self, name: str) -> str:
        """Return ``name`` in words."""
        for slip, right in SLIPS.items():
            name = name.replace(slip, right)
        if " " in name:
            return " ".join(map(self.spell, name.split()))
        if compact(name) in self.spelling:
            return self.spelling[compact(name)]
        parts = [self._cut(part) for part in re.findall(r"[a-z]+|[0-9]+", name)]
        return " ".join(parts) if all(parts) else name

    def _cut(self, letters: str) -> str | None:
        """Cut into known words so that the product of their frequencies is largest; None where that is impossible."""
        if letters.isdigit():
            return letters
        best: list[tuple[float, str] | None] = [(0.0, "")]
        for end in range(1, len(letters) + 1):
            choices = []
            for start in range(end):
                word = letters[start:end]
                if best[start] is None or not self._is_word(word):
                    continue
                score, before = best[start]
                choices.append((score + math.log(self.counts[word] / self.total), f"{before} {word}".strip()))
            best.append(max(choices, default=None))
        return best[-1][1] if best[-1] else None

    def _is_word(self, word: str) -> bool:
        return self.counts[word] > 0 and (len(word) > 2 or word in SHORT_WORDS)
