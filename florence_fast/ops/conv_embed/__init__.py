"""A strided convolution and a LayerNorm on channels-last maps."""

from florence_fast.ops.conv_embed.op import conv_embed, conv_embed_reference

__all__ = ["conv_embed", "conv_embed_reference"]
