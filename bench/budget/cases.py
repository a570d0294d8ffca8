"""What the static budget compiles: the cases of every op, each one call with the limits that its code must keep."""

import importlib
import pkgutil

import bench.budget.ops
from bench.budget.ops.base import Case

__all__ = ["ALLOWED", "CASES", "LEFT_OUT", "Case", "select"]

_MODULES = [
    importlib.import_module(f"bench.budget.ops.{x.name}") for x in pkgutil.iter_modules(bench.budget.ops.__path__)
]
_OPS = [module for module in _MODULES if hasattr(module, "CASES")]

CASES: tuple[Case, ...] = tuple(case for op in _OPS for case in op.CASES)

# What is known to break a limit, and how far it may go, by the case's name or by that and an architecture, as in
# "7x7 d32 bf16 forward, sm_80"; --check lists each. A line goes when its kernel is mended.
ALLOWED: dict[str, dict[str, float]] = {name: limits for op in _OPS for name, limits in op.ALLOWED.items()}

LEFT_OUT = {
    "_expand_kernel": "once a call: bias and mask, laid out as the tiles of a score",
    "_expand_bias_kernel": "once a call: the bias has the size of one window",
    "_fold_bias_grad_kernel": "once a call: the gradient of the bias has the size of one window",
    "_list_windows_kernel": "once a call: the places of one map's tokens, whatever the batch",
    "_patch_merging_fold_kernel": "once a call: a pass over the weights",
}
"""Kernels that are in no case, and why."""


def select(tier: str, substring: str = "") -> list[Case]:
    """Return the cases of a tier, "full" holding the "quick" ones too, whose name contains ``substring``."""
    return [case for case in CASES if tier in ("full", case.tier) and substring in case.name]
