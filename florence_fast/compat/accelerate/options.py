"""Options of `accelerate`: which parts of a layer use our ops."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What was asked of `accelerate`, carried by every forward that it puts into a module."""

    attention: bool = True
    """Window attention, with the products before and after it."""
    merging: bool = True
    """Patch merging between two stages."""
    mlp: bool = True
    """Both products of a feed-forward branch and the activation between them."""
    norm: bool = True
    """Normalisation, together with the residual sum before it where there is one."""
