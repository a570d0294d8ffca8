"""LayerNorm, alone or after the residual sum and the drop path of a block."""

from florence_fast.ops.layer_norm.op import layer_norm, layer_norm_reference

__all__ = ["layer_norm", "layer_norm_reference"]
