"""What the ops check alike, so that the same fault is called the same everywhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


def check_tensor(
    name: str, x: Any, *shapes: Shape, beside: Tensor | None = None, owner: str = "x", optional: bool = False
) -> None:
    """Raise what is wrong with an argument that has to be a floating-point tensor.

    Args:
        name: of the argument.
        x: its value.
        shapes: those that it may have; any if there is none.
        beside: the tensor on whose device it has to be, called ``owner``.
        owner: the name of the argument ``beside``.
        optional: whether it may be None.

    Raises:
        TypeError: it is no tensor, or not floating.
        ValueError: its shape or device is wrong.
    """
    if x is None and optional:
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    found = tuple(x.shape)
    for shape in shapes:
        if found == shape:  # not `in`, which dynamo does not know for symbolic sizes
            break
    else:
        if shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {found}")
    if beside is not None and x.device != beside.device:
        raise ValueError(f"{name} must be on the device of {owner}, {beside.device}, got {x.device}")


def check_eps(eps: Any) -> None:
    """Raise ValueError unless ``eps`` is a number that can be added to a variance."""
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {eps!r}")


def per_axis(name: str, value: Any, axes: int, kind: type = int) -> list[Any]:
    """Return ``value`` for each axis of a map, be it one or a sequence of them.

    Raises:
        ValueError: it is neither.
    """
    kinds = (kind, torch.SymInt) if torch.compiler.is_exporting() else kind
    values = [value] * axes if isinstance(value, kinds) else value
    if not isinstance(values, Sequence) or len(values) != axes or not all(isinstance(v, kinds) for v in values):
        raise ValueError(
            f"{name} must be one {kind.__name__} or {axes} of them, one per axis of the map, got {value!r}"
        )
    return list(values)
