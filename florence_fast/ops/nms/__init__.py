"""Non-maximum suppression of overlapping boxes, over all boxes or class by class."""

from florence_fast.ops.nms.op import batched_nms, batched_nms_reference, nms, nms_reference

__all__ = ["batched_nms", "batched_nms_reference", "nms", "nms_reference"]
