"""Modulated deformable convolution."""

from florence_fast.ops.deform_conv2d.op import deform_conv2d, deform_conv2d_reference

__all__ = ["deform_conv2d", "deform_conv2d_reference"]
