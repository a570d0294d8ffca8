"""Features brought to length 1."""

from florence_fast.ops.l2_normalize.op import l2_normalize, l2_normalize_reference

__all__ = ["l2_normalize", "l2_normalize_reference"]
