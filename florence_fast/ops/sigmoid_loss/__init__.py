"""Sigmoid loss between images and texts: SigLIP."""

from florence_fast.ops.sigmoid_loss.op import sigmoid_loss, sigmoid_loss_of_rows, sigmoid_loss_reference

__all__ = ["sigmoid_loss", "sigmoid_loss_of_rows", "sigmoid_loss_reference"]
