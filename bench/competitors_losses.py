"""What others compute the contrastive losses with: open_clip, Inf-CL, cut-cross-entropy, siglip-kernel.

Letters: B pairs · D embedding dim.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.competitors import SLOW, Build, Rival, field, found, needs_gpu, unless
from bench.session import Built, Missing, Plan
from florence_fast.ops.cases import Function, Inputs

MOST_PAIRS = 131_072
"""Up to here whoever has the memory is measured; a call on more takes seconds."""


def loss_field(op: str, eager: Rival, more: dict[str, Build]) -> dict[str, Build]:
    """Return the competitors of a contrastive loss; those that write all logits only where these have room."""
    builds = field(op, eager, more)
    for name in ("eager", *SLOW):
        builds[name] = unless(logits_have_no_room, builds[name])
    alone = "ours (triton)"
    return {name: build if name == alone else unless(too_many_pairs, build) for name, build in builds.items()}


def too_many_pairs(inputs: Inputs) -> str | None:
    """Say why only our kernels are measured."""
    pairs = len(inputs.tensors["image_features"])
    return f"measured up to {MOST_PAIRS:,} pairs: a call takes seconds" if pairs > MOST_PAIRS else None


def logits_have_no_room(inputs: Inputs) -> str | None:
    """Say why all logits cannot be written: the logits, their log softmax in both directions and two gradients."""
    if inputs.device.type != "cuda":
        return None
    features = inputs.tensors["image_features"]
    tensors = 5 if inputs.options["labels"] is None else 7  # the targets of every pair, too
    needed = tensors * len(features) ** 2 * features.element_size()
    room = torch.cuda.get_device_properties(inputs.device).total_memory
    if needed <= 0.9 * room:
        return None
    return f"all logits need about {needed / 1e9:,.0f} GB, and the device has {room / 1e9:,.0f}"


def _no_labels(inputs: Inputs) -> None:
    if inputs.options["labels"] is not None:
        raise Missing("has no labels")


def open_clip(inputs: Inputs, plan: Plan) -> Built:
    """Use ClipLoss with the flags that open_clip advises; on one GPU nothing is gathered."""
    loss = found("open_clip", "ClipLoss")(local_loss=True, gather_with_grad=True)
    _no_labels(inputs)
    return Built(lambda image_features, text_features, logit_scale: loss(image_features, text_features, logit_scale))


def _one_direction_twice(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """Return the mean over both directions of a loss that has one."""

    def both(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        scale = logit_scale.to(image_features.dtype)
        return (loss(image_features, text_features, scale) + loss(text_features, image_features, scale)) / 2

    return both


def inf_cl(inputs: Inputs, plan: Plan) -> Built:
    """Call Inf-CL's kernel once a direction; it works on 256 channels at a time."""
    loss = found("inf_cl", "cal_flash_loss")
    needs_gpu(inputs)
    _no_labels(inputs)
    dim = inputs.tensors["image_features"].shape[1]
    if dim % 256:
        raise Missing(f"D must be a multiple of 256 here, got {dim}")
    return Built(_one_direction_twice(lambda q, k, scale: loss(q, k, scale=scale, head_dim=256).mean()))


def cut_cross_entropy(inputs: Inputs, plan: Plan) -> Built:
    """Let each text be a class of a linear classifier, and each image; no gradient is left out as too small."""
    loss = found("cut_cross_entropy", "linear_cross_entropy")
    needs_gpu(inputs)
    _no_labels(inputs)
    own = torch.arange(len(inputs.tensors["image_features"]), device=inputs.device)
    exact = functools.partial(loss, targets=own, filter_eps=None)
    return Built(_one_direction_twice(lambda q, k, scale: exact(scale * q, k)))


def siglip_kernel(inputs: Inputs, plan: Plan) -> Built:
    """Call the public kernel for the sigmoid loss, which picks its variant by the device."""
    loss = found("siglip_kernel", "fused_siglip_loss")
    needs_gpu(inputs)
    _no_labels(inputs)

    def run(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return loss(image_features, text_features, logit_scale.log(), logit_bias)

    return Built(run)
