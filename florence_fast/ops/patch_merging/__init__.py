"""Swin's patch merging."""

from florence_fast.ops.patch_merging.op import patch_merging, patch_merging_reference

__all__ = ["patch_merging", "patch_merging_reference"]
