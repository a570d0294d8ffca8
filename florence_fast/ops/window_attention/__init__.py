"""Self-attention inside the windows of a map."""

from florence_fast.ops.window_attention.op import window_attention, window_attention_reference

__all__ = ["window_attention", "window_attention_reference"]
