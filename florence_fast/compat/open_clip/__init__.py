"""open_clip's losses and names on our kernels: ``import florence_fast as open_clip``, or patched into open_clip."""

from florence_fast.compat.open_clip.losses import ClipLoss, SigLipLoss
from florence_fast.compat.open_clip.names import (
    add_model_config,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    get_model_config,
    get_tokenizer,
    load_checkpoint,
    tokenize,
)
from florence_fast.compat.open_clip.patching import patch_open_clip, unpatch_open_clip

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "add_model_config",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "get_model_config",
    "get_tokenizer",
    "load_checkpoint",
    "patch_open_clip",
    "tokenize",
    "unpatch_open_clip",
]
