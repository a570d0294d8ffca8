"""SigLIP's loss with its whole matrix of logits, and what verification takes.

Letters: B pairs · D embedding dim.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Function, Inputs, Subject
from florence_fast.ops.contrastive_loss.cases import setup as draw_features


def setup(batch: int, dim: int, names: int | None, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the same with the scale and bias that SigLIP begins with."""
    inputs = draw_features(batch, dim, names, dtype, device, seed)
    scalars = {"logit_scale": 10.0, "logit_bias": -10.0}
    wide = inputs.tensors["logit_scale"]
    tensors = inputs.tensors | {name: torch.full_like(wide, value) for name, value in scalars.items()}
    return Inputs(tensors, inputs.options, inputs.grad_out)


def eager(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, labels: Tensor | None
) -> Tensor:
    """Compute all B x B logits and the log sigmoid of each."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    same = torch.eye(len(logits), device=logits.device).bool() if labels is None else labels[:, None] == labels
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(logits)


def _eager(inputs: Inputs) -> Function:
    return functools.partial(eager, **inputs.options)


def _case(name: str, batch: int, dim: int, names: int | None) -> Case:
    return Case(name, functools.partial(setup, batch, dim, names))


SUBJECT = Subject(
    op="sigmoid_loss",
    checked=(_case("SigLIP", 256, 128, None), _case("labels", 300, 96, 40)),
    timed={
        "cpu": _case("2,048 pairs, D=512", 2048, 512, None),
        "cuda": _case("16,384 pairs, D=512", 16384, 512, None),
    },
    rivals={"eager": _eager},
    small=(
        _case("SigLIP", 21, 24, None),
        _case("labels", 21, 24, 9),
        _case("labels", 21, 24, 9).given("tiles", chunk_size=8),
    ),
)
SUBJECTS = {"sigmoid_loss": SUBJECT}
