"""Interoperation with other libraries' models, weights and registries."""

from florence_fast.compat.accelerate import Report, accelerate, restore
from florence_fast.compat.convert import Conversion, convert
from florence_fast.compat.layouts import hugging_face as layouts_hugging_face  # the name that it had first

__all__ = ["Conversion", "Report", "accelerate", "convert", "layouts_hugging_face", "restore"]
