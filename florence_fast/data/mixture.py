"""Several sources as one, in which the samples of some come more often than those of others."""

import math
from collections.abc import Sequence
from fractions import Fraction

from florence_fast.data.pairs import Concat, PairSource

FINEST = 20  # of a factor's denominator
MOST_REPEATS = 1000


def mix(sources: Sequence[PairSource], factors: Sequence[float]) -> PairSource:
    """Join sources so that one epoch holds every sample of source i r_i times, with r_i proportional to its factor.

    The r_i are the smallest whole numbers in that proportion. No sample is left out, and the order still depends on
    seed and position alone.

    Args:
        sources: at least one.
        factors: how often each sample of a source comes, relative to the others; fractions down to a twentieth.

    Raises:
        ValueError: not one positive factor for each source, or they are too far from each other.

    >>> len(mix([photographs, drawings], [1, 2.5]))  # 2 len(photographs) + 5 len(drawings)
    """
    if len(sources) != len(factors):
        raise ValueError(f"factors must be one for each of {len(sources)} sources, got {len(factors)}")
    for factor in factors:
        if not 0 < factor < math.inf:
            raise ValueError(f"a factor must be a positive number, got {factor}")
    smallest = min(factors)
    exact = [Fraction(factor / smallest).limit_denominator(FINEST) for factor in factors]
    scale = math.lcm(*(share.denominator for share in exact))
    repeats = [int(share * scale) for share in exact]
    repeats = [count // math.gcd(*repeats) for count in repeats]
    if max(repeats) > MOST_REPEATS:
        raise ValueError(f"factors must not differ by more than {MOST_REPEATS} times, got {list(factors)}")
    parts = [source for source, count in zip(sources, repeats, strict=True) for _ in range(count)]
    return parts[0] if len(parts) == 1 else Concat(parts)
