"""The samples of a deformable convolution by Triton's kernels; the products are the ``torch`` backend's."""

from florence_fast.kernels.deform_conv2d import input_gradient, sample, sample_gradients

__all__ = ["input_gradient", "sample", "sample_gradients"]
