"""Layers shared by the image and text towers.

B batch · H W map height and width · C channels · h heads
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from florence_fast import ops

_M = TypeVar("_M", bound=nn.Module)


def add_branch(x: Tensor, branch: Tensor, drop_rate: float, training: bool) -> Tensor:
    """Return ``x + branch``, the branch left out for a random share of the samples while training (drop path).

    One draw a sample and call from torch's generator; what is kept is divided by the share that is kept, so the
    expectation is ``x + branch`` (Huang et al. 2016).

    Args:
        x: residual stream (B, ..., C).
        branch: same shape.
        drop_rate: share of samples that skip the branch, in [0, 1).
        training: False adds the branch of every sample.
    """
    factors = _drop_path_factors(branch, drop_rate, training)
    return x + branch if factors is None else torch.addcmul(x, branch, factors.view(-1, *[1] * (x.ndim - 1)))


def add_branch_and_norm(
    x: Tensor, branch: Tensor, norm: nn.LayerNorm, drop_rate: float = 0.0, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what ``add_branch`` does, and ``norm`` of it, in one pass; arguments as there."""
    if not is_plain(norm):
        x = add_branch(x, branch, drop_rate, training)
        return x, norm(x)
    factors = _drop_path_factors(branch, drop_rate, training)
    both = ops.layer_norm(branch, norm.weight, norm.bias, eps=norm.eps, residual=x, residual_scale=factors)
    return cast("tuple[Tensor, Tensor]", both)


def _drop_path_factors(branch: Tensor, drop_rate: float, training: bool) -> Tensor | None:
    """Return what the branch of each sample is multiplied with, (B,); None where that is 1."""
    if not training or drop_rate == 0:
        return None
    keep = 1 - drop_rate
    return torch.empty(branch.shape[0], dtype=branch.dtype, device=branch.device).bernoulli_(keep).div_(keep)


_LEAVES = (nn.Linear, nn.LayerNorm, nn.Conv2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(*modules: nn.Module, kinds: tuple[type[nn.Module], ...] = _LEAVES) -> bool:
    """Return whether these are PyTorch's own modules as they are, so that an op may compute from their weights.

    Adapters, quantisers and wrappers put another class in the place of the module, of its forward or of its weights, or
    hang hooks on it; such a module must be called. Hooks on all modules of the process are not looked for.
    """
    return all(
        type(module) in kinds
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and "forward" not in vars(module)
        and not any(is_traceable_wrapper_subclass(p) for p in module._parameters.values() if p is not None)
        for module in modules
    )


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return ``module(x)``, by our op if the module is PyTorch's own."""
    if not is_plain(module):
        return module(x)
    return cast(Tensor, ops.layer_norm(x, module.weight, module.bias, eps=module.eps))


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Return ``module(x)``, by the faster product if the module is PyTorch's own."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module) else module(x)


def module_list(modules: Iterable[_M]) -> Sequence[_M]:
    """Return an nn.ModuleList, typed by what it holds, which PyTorch's annotations leave out."""
    return cast("Sequence[_M]", nn.ModuleList(modules))


def drop_path_rates(depths: tuple[int, ...], rate: float) -> list[list[float]]:
    """Return one rate a block, a list a stage, rising linearly from 0 in the first block to ``rate`` in the last."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [
        [rate * (start + block) / last for block in range(depth)] for start, depth in zip(starts, depths, strict=True)
    ]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the GELU of CLIP and UniCL."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, shaped as ``x``."""
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Linear, GELU, Linear, under Swin's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        if is_plain(self.fc1, self.fc2):
            return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(self.fc1(x)))


def resize_bias_table(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Resize a table of relative position biases to another window, bicubically, as Swin does between resolutions.

    Args:
        table: ((2w-1)**2, h) of a square window w.
        window_size: height and width of the new window.

    Returns:
        ((2wh-1)(2ww-1), h), dtype of ``table``; ``table`` itself when the window is the same.

    Raises:
        ValueError: the table does not belong to a square window.
    """
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0] or side % 2 == 0:
        raise ValueError(f"a bias table of a square window w has (2w-1)**2 rows, got {tuple(table.shape)}")
    size = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
    if size == (side, side):
        return table
    grid = table.detach().float().T.reshape(1, -1, side, side)  # (1, h, 2w-1, 2w-1)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous().to(table.dtype)


def centre_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Put the table of a window that was cut to its map into that of the whole window, which computes the same.

    Swins whose last map is smaller than the window have a smaller table there. On such a map the table of the whole
    window is read at its centre alone.

    Args:
        table: ((2w-1)**2, h) of a square window w.
        window_size: of the new window, at least w.

    Returns:
        ((2*window_size-1)**2, h), zeros around ``table``.
    """
    side = math.isqrt(table.shape[0])
    margin = (2 * window_size - 1 - side) // 2
    grid = table.detach().unflatten(0, (side, side))
    return F.pad(grid, (0, 0, margin, margin, margin, margin)).flatten(0, 1)


def init_weights(module: nn.Module) -> None:
    """Draw the parameters that ``module`` itself owns: products by their fan-in, norms as ones, biases as zeros.

    Swin cuts its normal numbers off at 2, which no deviation here comes near, and looking for them takes longer than to
    draw them. Its fixed deviation of 0.02 suits widths near a thousand. At 48 it starts so quietly that every text, and
    every image, gets the same features, and the contrastive loss stays at log B.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.7 * math.sqrt(2 / module.weight[0].numel()))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def quieten_branches(outputs: list[nn.Linear]) -> None:
    """Scale the last product of each residual branch by 1/sqrt(their number), so that depth does not add variance.

    This is what CLIP and GPT-2 do; ``outputs`` holds two a block.
    """
    for linear in outputs:
        linear.weight.mul_(len(outputs) ** -0.5)
