"""Gradient cache: the exact gradient of a large contrastive batch in the memory of a small one (section 2.2).

A contrastive loss needs the features of the whole batch, but the towers' activations of only one part at a time:
features without a graph, the loss and its gradient on the features, then each part forward once more and backward
with the gradient that was kept. It costs one more forward, and nothing in exactness (Gao et al., arXiv 2101.06983).

Letters: B pairs · T distinct texts · L tokens of a text · D embedding dim
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]
Scale = float | Callable[[Tensor], Tensor]
Part = tuple[Tensor | None, Tensor | None]


class GradCache:
    """Run forward and backward of a dual encoder in micro-batches, with the gradient of the whole batch.

    The model is only ever called as ``model(image=..., text=...)``, either of them None, and must return image
    features, text features and the scale, so wrappers such as DistributedDataParallel see every pass; their gradients
    are synchronised once, in the last micro-batch. The second pass replays the random generators of the CPU and of
    the inputs' devices, so drop path and dropout draw the masks of the first. Forward passes run under the autocast
    that surrounds the call, backward passes outside it.

    What computes across a micro-batch (batch normalisation) sees micro-batches, and updates its statistics twice.

    Args:
        model: the dual encoder, wrapped or not.
        loss: ``loss(image_features, text_features, logit_scale)`` or, with labels, ``loss(..., labels)`` -> scalar.
        micro_batch_size: the most pictures, and the most texts, of one forward pass.

    Raises:
        ValueError: micro_batch_size is not a positive int.

    >>> cache = GradCache(model, ContrastiveLoss(), micro_batch_size=64)
    >>> loss = cache.step(images, tokens, labels)
    >>> optimizer.step()
    """

    def __init__(self, model: nn.Module, loss: Loss, micro_batch_size: int) -> None:
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be a positive int, got {micro_batch_size!r}")
        self.model = model
        self.loss = loss
        self.micro_batch_size = micro_batch_size

    def step(
        self,
        images: Tensor,
        texts: Tensor,
        labels: Tensor | None = None,
        text_index: Tensor | None = None,
        *,
        scale: Scale = 1.0,
    ) -> Tensor:
        """Add the gradients of the batch's loss to the parameters' ``grad``.

        Args:
            images: (B, ...).
            texts: (B, L), or (T, L) with ``text_index``.
            labels: (B,), handed on to the loss.
            text_index: (B,) int64, the row of ``texts`` that belongs to each image, so that each distinct text is
                encoded once.
            scale: what the loss is multiplied with before the backward pass; ``scaler.scale`` of a GradScaler.

        Returns:
            The loss, not scaled, without a graph.

        Raises:
            ValueError: an empty batch, or as many texts (or indices) as images are wanted and not given.
        """
        _check_step(images, texts, text_index)
        parts = self._parts(images, texts)
        states, features = self._first_pass(parts)
        loss, gradients = self._loss_and_gradients(features, labels, text_index, scale)
        self._second_pass(parts, states, gradients)
        return loss

    def _parts(self, images: Tensor, texts: Tensor) -> list[Part]:
        """Deal images and texts evenly, at least one of each to the last part: there DDP waits for every parameter."""
        count = -(-max(len(images), len(texts)) // self.micro_batch_size)
        return list(zip(_cut(images, count), _cut(texts, count), strict=True))

    @torch.no_grad()
    def _first_pass(self, parts: list[Part]) -> tuple[list["_RandomState"], list[Tensor]]:
        """Return the random state before each part, and features and scale of the whole batch."""
        states, images, texts = [], [], []
        for image, text in parts:
            states.append(_RandomState(image, text))
            image_features, text_features, logit_scale = self.model(image=image, text=text)
            images += [] if image is None else [image_features]
            texts += [] if text is None else [text_features]
        # Older torch keeps the weights that autocast has cast here, without a graph: used again, they would get no
        # gradient (pytorch pull request 165068).
        torch.clear_autocast_cache()
        return states, [torch.cat(images), torch.cat(texts), logit_scale]

    def _loss_and_gradients(
        self, features: list[Tensor], labels: Tensor | None, text_index: Tensor | None, scale: Scale
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and its gradients for ``features`` in their dtypes, summed in at least float32."""
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in features]
        images, texts, logit_scale = leaves
        if text_index is not None:
            texts = texts.index_select(0, text_index)
        loss = self.loss(images, texts, logit_scale, *([] if labels is None else [labels]))
        scaled = scale(loss) if callable(scale) else loss * scale
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(scaled, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), [grad.to(x.dtype) for grad, x in zip(gradients, features, strict=True)]

    def _second_pass(self, parts: list[Part], states: list["_RandomState"], gradients: list[Tensor]) -> None:
        """Run every part forward with its masks of the first pass, and backward with its rows of ``gradients``."""
        dimages, dtexts, dscale = gradients
        image_rows = dimages.split([_length(image) for image, _ in parts])
        text_rows = dtexts.split([_length(text) for _, text in parts])
        with torch.random.fork_rng(devices=states[0].devices):
            for number, (image, text) in enumerate(parts):
                last = number == len(parts) - 1
                states[number].restore()
                with self._synchronised(last):
                    outputs = self.model(image=image, text=text)
                    _backward(outputs, (image_rows[number], text_rows[number], dscale if last else None))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync()


class _RandomState:
    """The state of torch's generators on the CPU and on the devices of some tensors."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.devices = sorted({x.device.index for x in tensors if x is not None and x.is_cuda})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


def _backward(outputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
    """Go backward from those outputs that have a gradient to pass on; a frozen tower has none."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if output is not None and gradient is not None and output.requires_grad
    ]
    if pairs:
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            torch.autograd.backward(*zip(*pairs, strict=True))


def _cut(x: Tensor, count: int) -> list[Tensor | None]:
    """Cut ``x`` into ``count`` even parts, the last never empty; an empty one is None."""
    bounds = [len(x) * part // count for part in range(count + 1)]
    return [x[start:end] if start < end else None for start, end in itertools.pairwise(bounds)]


def _length(x: Tensor | None) -> int:
    return 0 if x is None else len(x)


def _check_step(images: Tensor, texts: Tensor, text_index: Tensor | None) -> None:
    if len(images) == 0 or len(texts) == 0:
        raise ValueError(f"images and texts must not be empty, got {len(images)} images and {len(texts)} texts")
    if text_index is None and len(texts) != len(images):
        raise ValueError(
            f"texts must hold one text per image, {len(images)}, unless text_index spreads them; got {len(texts)}"
        )
    if text_index is not None and (text_index.dtype != torch.int64 or text_index.shape != images.shape[:1]):
        raise ValueError(
            f"text_index must be int64 of shape ({len(images)},), got {text_index.dtype} of {tuple(text_index.shape)}"
        )
