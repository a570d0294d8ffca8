"""The feed-forward branch of a transformer block."""

from florence_fast.ops.mlp.op import mlp, mlp_reference

__all__ = ["mlp", "mlp_reference"]
