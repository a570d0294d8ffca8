"""The ``triton`` backend of mlp: the kernels of the activation, between products of the library's."""

from florence_fast.kernels.bias_activation import bias_activation_bwd, bias_activation_fwd

__all__ = ["bias_activation_bwd", "bias_activation_fwd"]
