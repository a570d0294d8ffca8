"""Meeting points with other people's code and weights."""

from florence_fast.compat.accelerate import Report, accelerate, restore
from florence_fast.compat.convert import Conversion, convert

__all__ = ["Conversion", "Report", "accelerate", "convert", "restore"]
