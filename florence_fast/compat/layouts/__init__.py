"""Names and shapes of the tensors in other libraries' checkpoints, from and to ours: one file a layout."""

from florence_fast.compat.layouts import clip_text, hugging_face, microsoft, open_clip, timm, torchvision

__all__ = ["clip_text", "hugging_face", "microsoft", "open_clip", "timm", "torchvision"]
