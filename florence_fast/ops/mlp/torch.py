"""The ``torch`` backend of the activation between the two products of mlp: library calls only, on any device.

The bias is added by the first product, so that ``hidden`` holds it already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK = 1.702


def bias_activation_fwd(hidden: Tensor, bias: None, activation: str, in_place: bool) -> Tensor:
    """Return the activation of ``hidden`` (R, F); ``in_place`` is what a library call cannot do, and is ignored."""
    if activation == "quick_gelu":
        return F.silu(hidden * QUICK, inplace=True).div_(QUICK)
    return F.gelu(hidden, approximate=_APPROXIMATE[activation])


def bias_activation_bwd(
    grad_out: Tensor, hidden: Tensor, bias: None, activation: str, needs_out: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of ``hidden``, the activation and the gradient of the bias, None unless asked for."""
    out = bias_activation_fwd(hidden, None, activation, False) if needs_out else None
    if activation == "quick_gelu":
        d_hidden = torch.ops.aten.silu_backward(grad_out, hidden * QUICK)
    else:
        d_hidden = torch.ops.aten.gelu_backward(grad_out, hidden, approximate=_APPROXIMATE[activation])
    return d_hidden, out, d_hidden.sum(0) if needs_bias else None


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
