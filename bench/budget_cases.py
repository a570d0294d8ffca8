"""What the static budget compiles: the cases of every op, each one call with the limits that its code must keep."""

from bench.budget_ops import bias_activation, contrastive_loss, deform_conv2d, patch_merging, rows, window_attention
from bench.budget_ops.base import Case

__all__ = ["ALLOWED", "CASES", "Case", "select"]

_OPS = (window_attention, contrastive_loss, rows, patch_merging, bias_activation, deform_conv2d)

CASES: tuple[Case, ...] = tuple(case for op in _OPS for case in op.CASES)

# What is known to break a limit, and how far it may go; --check lists each. A line goes when its kernel is mended.
ALLOWED: dict[str, dict[str, float]] = {name: limits for op in _OPS for name, limits in op.ALLOWED.items()}


def select(tier: str, substring: str = "") -> list[Case]:
    """Return the cases of a tier, "full" holding the "quick" ones too, whose name contains ``substring``."""
    return [case for case in CASES if tier in ("full", case.tier) and substring in case.name]
