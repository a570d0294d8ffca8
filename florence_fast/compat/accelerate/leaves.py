"""Linear layers and convolutions outside the known layers: patch embeddings, heads, decoders.

On a processor without units for 16-bit formats one convolution in bf16 takes longer than all known layers of a Swin
together. There, and only there, these modules widen their operands as the ops do; in float32 they compute as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast import ops, processor
from florence_fast.compat.accelerate.overlay import lay_over
from florence_fast.models.layers import is_plain
from florence_fast.ops.linear import convolution, is_slow


def forward_linear(module: nn.Linear, input: Tensor) -> Tensor:
    """Stand in for nn.Linear.forward."""
    if is_slow(input) and _is_as_it_was(module):
        return ops.linear(input, module.weight, module.bias)
    return nn.Linear.forward(module, input)


def forward_convolution(module: nn.Conv2d | nn.Conv3d, input: Tensor) -> Tensor:
    """Stand in for the forward of nn.Conv2d and nn.Conv3d."""
    if is_slow(input) and _is_as_it_was(module) and module.padding_mode == "zeros":
        places = (module.stride, module.padding, module.dilation, module.groups)
        convolve = F.conv2d if isinstance(module, nn.Conv2d) else F.conv3d
        return convolution(convolve, input, module.weight, module.bias, *places)
    return type(module).forward(module, input)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: forward_linear,
    nn.Conv2d: forward_convolution,
    nn.Conv3d: forward_convolution,
}


def swap(model: nn.Module, known: tuple[str, ...]) -> list[str]:
    """Lay our forwards over those of the plain modules outside the layers named ``known``; return their names.

    Nothing is done where the processor multiplies both 16-bit formats.
    """
    if all(processor.units(format).fast for format in ("bf16", "fp16")):
        return []
    swapped = []
    inside = tuple(f"{name}." if name else "" for name in known)
    for name, module in model.named_modules():
        if type(module) in FORWARDS and is_plain(module, kinds=tuple(FORWARDS)) and not name.startswith(inside):
            lay_over(module, FORWARDS[type(module)])
            swapped.append(name)
    return swapped


def swapped_in(model: nn.Module) -> Iterator[nn.Module]:
    """Find the modules that `swap` changed."""
    for module in model.modules():
        forward: Any = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func in FORWARDS.values():
            yield module


def _is_as_it_was(module: nn.Module) -> bool:
    """Say whether the weights are still plain tensors, which a quantiser may have replaced since."""
    return all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
