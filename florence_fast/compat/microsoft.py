"""Start CoSwin from Microsoft's Swin weights, the only large public weights of the family.

`create_model(..., pretrained=file)` reads Swin and UniCL files into the models they were made from; this module carries
a plain Swin over to CoSwin, whose stem and merges are other layers:

- The stem fits exactly: the 4x4 patch stands at taps [2:6, 2:6] of the 7x7 kernel, whose padding is 2.
- A merge's four neighbours fit taps [1:3, 1:3] of the 3x3 kernel, but Swin normalises them before the product and
  CoSwin afterwards: the product keeps Swin's weights and its normalisation starts afresh, so that some training is
  needed before the features mean again what they meant.
- Blocks and the final normalisation are the same.
"""

from __future__ import annotations

import os

from torch import Tensor

from florence_fast.models import CoSwin, Florence
from florence_fast.models.pretrained import load_state
from florence_fast.models.reading import read_checkpoint

# where Swin's merge lays the four neighbours (row, column) in the 4C channels that it reduces
_NEIGHBOURS = ((0, 0), (1, 0), (0, 1), (1, 1))


def coswin_from_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights of a plain Swin into those of a CoSwin of the same widths, depths and heads.

    Args:
        state: name -> tensor of `florence_fast.models.Swin`; a classifier passes through.

    Returns:
        name -> tensor of `florence_fast.models.CoSwin`.

    Raises:
        ValueError: ``state`` has no 4x4 stem, so that it is not a plain Swin's, or a merge is misshapen.
    """
    stem = state.get("patch_embed.proj.weight")
    if stem is None or stem.shape[2:] != (4, 4):
        found = "none" if stem is None else tuple(stem.shape)
        raise ValueError(f"a plain Swin has patch_embed.proj.weight of shape (C, 3, 4, 4), got {found}")
    carried = dict(state)
    carried["patch_embed.proj.weight"] = stem.new_zeros(*stem.shape[:2], 7, 7)
    carried["patch_embed.proj.weight"][:, :, 2:6, 2:6] = stem
    for name in [name for name in state if name.endswith("downsample.reduction.weight")]:
        merge = name.removesuffix("reduction.weight")
        carried.pop(name)
        carried |= _conv_merge(merge, state[name], state.get(f"{merge}norm.weight"))
    return carried


def _conv_merge(prefix: str, reduction: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """Lay a reduction (2C, 4C), with the scale (4C,) of the norm before it, into a 3x3 kernel (2C, C, 3, 3)."""
    width = reduction.shape[-1] // 4 if reduction.ndim else 0
    if not width or reduction.shape != (2 * width, 4 * width) or scale is None or scale.shape != (4 * width,):
        found = "none" if scale is None else tuple(scale.shape)
        raise ValueError(
            f"{prefix}reduction.weight must have shape (2C, 4C) and {prefix}norm.weight (4C,), "
            f"got {tuple(reduction.shape)} and {found}"
        )
    kernel = reduction.new_zeros(2 * width, width, 3, 3)
    for (row, column), taps in zip(_NEIGHBOURS, (reduction * scale).split(width, dim=1), strict=True):
        kernel[:, :, 1 + row, 1 + column] = taps
    return {
        f"{prefix}proj.weight": kernel,
        f"{prefix}norm.weight": reduction.new_ones(2 * width),
        f"{prefix}norm.bias": reduction.new_zeros(2 * width),
    }


def warm_start_coswin(model: CoSwin | Florence, weights: str | os.PathLike[str]) -> None:
    """Load a plain Swin's file into a CoSwin, or into the image tower of a Florence; see the head of this module.

    Args:
        model: widths, depths and heads must be the file's; another window is met by resizing the bias tables.
        weights: a Swin or UniCL file in any layout that ``pretrained=`` reads.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is no plain Swin's, or one of another size.

    >>> model = ff.create_model("florence_tiny")
    >>> warm_start_coswin(model, "swin_tiny_patch4_window7_224.pth")
    """
    tower = model.visual if isinstance(model, Florence) else model
    if not isinstance(tower, CoSwin):
        raise ValueError(f"model must be a CoSwin or hold one, got {type(tower).__name__}: load Swin with pretrained=")
    checkpoint = read_checkpoint(weights)
    state = checkpoint.state
    if any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    load_state(tower, coswin_from_swin(state), source=str(checkpoint.path))
