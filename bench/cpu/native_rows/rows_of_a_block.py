"""Row-wise work between the products of a block: layer norm of the residual sum, and GELU of a product with its bias.

Letters: C channels · F hidden width · R rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu.native_rows.base import DTYPES, OURS, Call, Run, Subject
from florence_fast import ops
from florence_fast.ops.layer_norm.cases import plain_layer_norm_residual
from florence_fast.ops.mlp import cpp as mlp_cpp

OPS = ("layer_norm_residual", "bias_gelu")
WIDTHS = {"Swin-T": 96, "Swin-B": 128}
ROWS = (25088, 6272, 1568, 392)
"""Tokens of 8 images of 224 pixels at each stage; the channels double from one to the next."""


def measure(run: Run) -> None:
    """Make the rows."""
    cases = [(f"{model} stage {i + 1}", R, C << i) for model, C in WIDTHS.items() for i, R in enumerate(ROWS)]
    for op, width, build in (("layer_norm_residual", 1, _layer_norm), ("bias_gelu", 4, _bias_gelu)):
        for dtype in DTYPES:
            for name, R, C in [("tiny", 32, 16)] if run.tiny else cases:
                subject = Subject(
                    op, f"{name}, {R:,} x {C * width:,}", {"rows": R, "width": C * width}, dtype, "forward"
                )
                if run.wanted(subject, {OURS: None, "eager": None}):
                    run.compare(
                        subject, {name: lambda call=call: call for name, call in build(R, C * width, dtype).items()}
                    )


def _layer_norm(R: int, C: int, dtype: str) -> dict[str, Call]:
    x, residual = (torch.randn(R, C).to(DTYPES[dtype]) for _ in range(2))
    weight, bias = (torch.randn(C).to(DTYPES[dtype]) for _ in range(2))

    def ours() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return ops.layer_norm(x, weight, bias, residual=residual)

    def eager() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return plain_layer_norm_residual(x, residual, weight, bias)

    return {OURS: ours, "eager": eager}


def _bias_gelu(R: int, F_: int, dtype: str) -> dict[str, Call]:
    """Both write a new tensor: inside ``ops.mlp`` ours works in place, but eager PyTorch has no such form of it."""
    x, bias = torch.randn(R, F_).to(DTYPES[dtype]), torch.randn(F_).to(DTYPES[dtype])

    def eager() -> Tensor:
        with torch.inference_mode():
            return F.gelu(x + bias)

    return {OURS: lambda: mlp_cpp.bias_activation_fwd(x, bias, "gelu", False), "eager": eager}
