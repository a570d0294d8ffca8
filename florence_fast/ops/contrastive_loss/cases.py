"""The contrastive loss with its whole matrix of logits, as open_clip and UniCL compute it, and what verification takes.

Letters: B pairs · D embedding dim.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.ops.cases import Case, Function, Inputs, Subject, generator


def setup(batch: int, dim: int, names: int | None, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw normalised features whose pairs are a little alike, and labels out of ``names``, or none.

    The noise keeps the loss near 1, as in training: a loss near 0 would be nothing but the rounding of a difference.
    """
    draw = generator(device, seed)
    wide = torch.promote_types(dtype, torch.float32)
    images = torch.randn(batch, dim, generator=draw, device=device, dtype=wide)
    texts = images + 3 * torch.randn(batch, dim, generator=draw, device=device, dtype=wide)
    features = {"image_features": images, "text_features": texts}
    tensors = {name: F.normalize(x, dim=-1).to(dtype) for name, x in features.items()}
    tensors["logit_scale"] = torch.tensor(20.0, device=device, dtype=wide)
    labels = None if names is None else torch.randint(names, (batch,), generator=draw, device=device)
    return Inputs(tensors, {"labels": labels}, torch.ones((), device=device, dtype=wide))


def repeated_setup(
    batch: int, dim: int, names: int | None, repeats: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Inputs:
    """Draw ``batch / repeats`` pairs and take each ``repeats`` times: float64 decides on the draw alone.

    Every sum over a row or column of logits then has each term ``repeats`` times, so that the loss grows by the
    logarithm of that, and each copy gets its part of a feature's gradient. Copies of a text share its label; without
    labels a copy's own text is the target, which is the same number.

    Raises:
        ValueError: the batch is not so many times a draw.
    """
    if repeats < 1 or batch % repeats:
        raise ValueError(f"batch must be a multiple of repeats, got {batch} and {repeats}")
    draw = setup(batch // repeats, dim, names, dtype, device, seed)
    if repeats == 1:
        return draw
    tensors = {name: x.repeat(repeats, 1) if x.ndim else x for name, x in draw.tensors.items()}
    labels = draw.options["labels"]
    options = {"labels": None if labels is None else labels.repeat(repeats)}

    def enlarged(results: dict[str, Tensor]) -> dict[str, Tensor]:
        features = {name: x.repeat(repeats, 1) / repeats for name, x in results.items() if x.ndim}
        return results | features | {"out": results["out"] + math.log(repeats)}

    return Inputs(tensors, options, draw.grad_out, smaller=draw, enlarged=enlarged)


def eager(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, labels: Tensor | None) -> Tensor:
    """Compute all B x B logits and their log softmax in both directions."""
    logits = logit_scale * image_features @ text_features.T
    if labels is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    same = (labels[:, None] == labels).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _eager(inputs: Inputs) -> Function:
    return functools.partial(eager, **inputs.options)


def _case(name: str, batch: int, dim: int, names: int | None) -> Case:
    return Case(name, functools.partial(setup, batch, dim, names))


SUBJECT = Subject(
    op="contrastive_loss",
    checked=(_case("CLIP", 256, 128, None), _case("UniCL", 300, 96, 40)),
    timed={
        "cpu": _case("2,048 pairs, D=512", 2048, 512, None),
        "cuda": _case("16,384 pairs, D=512", 16384, 512, None),
    },
    rivals={"eager": _eager},
    small=(
        _case("CLIP", 21, 24, None),
        _case("UniCL", 21, 24, 9),
        _case("UniCL", 21, 24, 9).given("tiles", chunk_size=8),
        _case("UniCL", 21, 24, 9).given("the paper's sum", reduction="sum_directions"),
        _case("UniCL", 21, 24, 9).given("one way", reduction="image_to_text"),
    ),
)
SUBJECTS = {"contrastive_loss": SUBJECT}
