"""Self-attention inside windows that are cut out already."""

from florence_fast.ops.window_attention_partitioned.op import (
    window_attention_partitioned,
    window_attention_partitioned_reference,
)

__all__ = ["window_attention_partitioned", "window_attention_partitioned_reference"]
