"""Swins of other libraries on our kernels, swapped in place: one file for each kind of block."""

from florence_fast.compat.accelerate.swapping import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
