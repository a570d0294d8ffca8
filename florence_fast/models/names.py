"""The registered names as types, so that editors know what `create_model` returns. A test keeps them complete."""

from typing import Literal, TypeAlias

DualEncoderName: TypeAlias = Literal[
    "florence_nano",
    "florence_tiny",
    "florence_small",
    "florence_base",
    "florence_large",
    "florence_huge",
    "unicl_swin_tiny",
    "unicl_swin_base",
]
TowerName: TypeAlias = Literal[
    "coswin_nano",
    "coswin_tiny",
    "coswin_small",
    "coswin_base",
    "coswin_large",
    "coswin_huge",
    "swin_tiny",
    "swin_small",
    "swin_base",
    "swin_large",
]
