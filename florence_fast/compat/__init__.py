"""Meeting points with other people's code and weights."""

from florence_fast.compat.accelerate import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
