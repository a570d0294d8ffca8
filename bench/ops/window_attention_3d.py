"""Window attention on frames and volumes: Video Swin's stages, and the first of MONAI's SwinUNETR.

The formulas are those in two dimensions: tokens, windows and heads are counted alike.
"""

from bench.competitors_swin import monai
from bench.competitors_windows import SLOW_TO_BUILD, window_field
from bench.ops.window_attention import budget_cases, bytes_moved, flops, units
from florence_fast.ops.window_attention.cases import SUBJECT, Shape3d, setup

__all__ = [
    "COMPETITORS",
    "ENTRY",
    "OP",
    "PLACE",
    "REHEARSAL",
    "SHAPES",
    "SLOW_TO_BUILD",
    "WHAT",
    "budget_cases",
    "bytes_moved",
    "flops",
    "setup",
    "units",
]

OP, ENTRY = "window_attention_3d", "window_attention"
PLACE = 2
WHAT = "the same on frames and volumes: Video Swin's stages and SwinUNETR's"
_LONG = {"window": (16, 7, 7), "shift": (8, 3, 3)}
_CUBE = {"window": (7, 7, 7), "shift": (3, 3, 3), "head_dim": 16}
# 32 frames are 16 after the patches, and Video Swin's longer window has all of them. A volume of 96 voxels a side has
# 48 after the patches of SwinUNETR, which seven does not divide: its maps are ragged.
SHAPES = {
    "video_swin_t_stage1_224": Shape3d(4, 16, 56, 56, 3),
    "video_swin_t_stage3_224": Shape3d(4, 16, 14, 14, 12),
    "swin_unetr_stage1_96": Shape3d(2, 48, 48, 48, 3, **_CUBE),
    "video_swin_t_stage1_224_unshifted": Shape3d(4, 16, 56, 56, 3, shift=(0, 0, 0)),
    "video_swin_b_stage1_224_window16": Shape3d(2, 16, 56, 56, 4, **_LONG),
    "video_swin_b_stage3_224_window16": Shape3d(4, 16, 14, 14, 16, **_LONG),
    "swin_unetr_stage1_96_unshifted": Shape3d(2, 48, 48, 48, 3, **(_CUBE | {"shift": (0, 0, 0)})),
}
REHEARSAL = {"tiny": Shape3d(1, 2, 3, 5, 1, window=(2, 3, 3), shift=(1, 1, 1), head_dim=16)}

COMPETITORS = window_field(ENTRY, SUBJECT.rivals, {"monai (sdpa)": monai})
