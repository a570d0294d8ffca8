"""The ops: check the arguments, choose the backend, run. Each op is one file, and each file looks like the next."""

from florence_fast.ops._backend import OPS, Explanation, OpEntry, backend, explain
from florence_fast.ops.contrastive_loss import contrastive_loss, contrastive_loss_reference
from florence_fast.ops.window_attention import window_attention, window_attention_reference

__all__ = [
    "OPS",
    "Explanation",
    "OpEntry",
    "backend",
    "contrastive_loss",
    "contrastive_loss_reference",
    "explain",
    "window_attention",
    "window_attention_reference",
]
