"""One training step up to its gradients: a batch becomes pictures and distinct texts, features, and the loss.

Letters: B pairs of a batch · T distinct texts among them · L length of the longest of these texts · D embedding dim
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from florence_fast.data.loader import Batch
from florence_fast.precision import autocast, input_dtype
from florence_fast.ranges import annotated
from florence_fast.train.config import TrainConfig
from florence_fast.train.distributed import rank, world_size
from florence_fast.train.grad_cache import GradCache
from florence_fast.train.loss import ContrastiveLoss

Augment = Callable[[Tensor, int, int, int], Tensor]
_RANK_STRIDE = 1_000_003


class Prepared(NamedTuple):
    """A batch on its device."""

    images: Tensor  # (B, 3, H, W), normalised
    tokens: Tensor  # (T, L)
    which: Tensor  # (B,): row of `tokens` that belongs to each picture
    labels: Tensor | None  # (B,), None for CLIP's loss


class ContrastiveStep:
    """Compute the loss of a batch and leave its gradients on the model's parameters.

    Every distinct text is encoded once and spread back to its pictures. Features are normalised and compared in fp32.

    Args:
        model: a Florence on its device; it is wrapped for DDP when several processes train.
        tokenizer: turns a list of texts into (T, context_length) ids, zero padded.
        config: precision, loss, loss_reduction, loss_chunk_size, gather, micro_batch_size and seed are read.
        augment: `augment(images_uint8, image_size, seed, step) -> (B, 3, size, size)`, normalised; None only resizes.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], config: TrainConfig, augment: Augment | None
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.dtype = input_dtype(model)
        self.augment = augment or plain_images(model, self.device)
        self.loss = ContrastiveLoss(config.loss_reduction, config.loss_chunk_size, config.gather)
        self.wrap(model)

    def wrap(self, model: nn.Module) -> None:
        """Take ``model``, whose parameters may have been replaced, as what is trained from now on."""
        self.model = model
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, batch: Batch, image_size: int, step: int, scaler: torch.amp.GradScaler) -> Tensor:
        """Run forward and backward.

        Returns:
            The loss of the joined batch: 0-D, without a graph, still on the device.
        """
        return self._backward(self.prepare(batch, image_size, step), scaler)

    @annotated("train.prepare")
    def prepare(self, batch: Batch, image_size: int, step: int) -> Prepared:
        """Augment the pictures, tokenise each distinct text once and cut the tokens to the longest."""
        row_of = {text: row for row, text in enumerate(dict.fromkeys(batch.texts))}
        tokens = self.tokenizer(list(row_of))
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        which = torch.tensor([row_of[text] for text in batch.texts], device="cpu")
        images = batch.images.to(self.device, non_blocking=True)
        images = self.augment(images, image_size, self.config.seed + _RANK_STRIDE * rank(), step)
        labels = batch.labels.to(self.device, non_blocking=True) if self.config.loss == "unicl" else None
        return Prepared(images.to(self.dtype), tokens.to(self.device), which.to(self.device), labels)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast region of the configured precision; without autocast it changes nothing."""
        return autocast(self.config.precision, self.device)

    def _backward(self, batch: Prepared, scaler: torch.amp.GradScaler) -> Tensor:
        if self.config.micro_batch_size is not None:
            loss = functools.partial(self._loss, batch.which)
            cache = GradCache(self.model, loss, self.config.micro_batch_size)
            with self.autocast():
                return cache.step(batch.images, batch.tokens, labels=batch.labels, scale=scaler.scale)
        with self.autocast():
            outputs = self.model(batch.images, batch.tokens)
        loss = self._loss(batch.which, *outputs, batch.labels)
        scaler.scale(loss).backward()
        return loss.detach()

    def _loss(
        self, which: Tensor, images: Tensor, texts: Tensor, logit_scale: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        texts = texts.float().index_select(0, which)
        return self.loss(images.float(), texts, logit_scale.float(), labels)


def plain_images(model: nn.Module, device: torch.device) -> Augment:
    """Return an augmentation that changes nothing: it resizes by area and normalises as the model's config says."""
    mean = torch.tensor(model.config.image_mean, device=device).view(3, 1, 1)
    std = torch.tensor(model.config.image_std, device=device).view(3, 1, 1)

    def resize_and_normalise(images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        x = images.float().div_(255)
        if x.shape[-2:] != (image_size, image_size):
            x = F.interpolate(x, size=(image_size, image_size), mode="area")
        return (x - mean) / std

    return resize_and_normalise


def agree(loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, float, bool, bool]:
    """Bring loss and gradient norm to the CPU in one transfer, and let all ranks agree on whether to go on.

    Returns:
        Loss, norm, whether both are finite on every rank, and whether some rank was asked to stop.
    """
    values = torch.stack([loss.float(), norm.float()])
    trouble = torch.stack([~values.isfinite().all(), torch.tensor(stop, device=values.device)]).float()
    if world_size() > 1:
        dist.all_reduce(trouble, dist.ReduceOp.MAX)
    loss_value, norm_value, broken, stopping = torch.cat([values, trouble]).tolist()
    return loss_value, norm_value, not broken, bool(stopping)
