"""open_clip's ``ClipLoss`` and ``SigLipLoss`` in O(B D) memory: its constructors, values and gradients, rank by rank.

open_clip's flags decide what a rank returns and what its gradient is. With L the loss of the joined batch and l_r that
of rank r's own rows against the columns of all, so that L = mean_r l_r:

    loss                             returns   gradient of the rank's features   gradient of scale and bias
    ClipLoss()                       L         dL                                dL
    ClipLoss(gather_with_grad)       L         W dL                              dL
    ClipLoss(local_loss, gather_...) l_r       W dL = d(sum of all l)            dl_r
    ClipLoss(local_loss)             l_r       dl_r with all columns constant    dl_r
    SigLipLoss(any dist_impl)        l_r       W dL                              dl_r

The mean over ranks that DistributedDataParallel takes makes the exact gradient of L of those with W dL and dL or dl_r.
The first one's features get a W-th of it while the scale gets all, and the fourth loses what the columns would send
back: both are open_clip's, and are followed.

Letters: B pairs of all ranks together · b pairs of this rank · W number of ranks · D embedding dim
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from florence_fast.errors import unknown
from florence_fast.ops.contrastive_loss import contrastive_loss
from florence_fast.ops.logits.checks import check_features, check_scalar
from florence_fast.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_of_rows
from florence_fast.train import distributed
from florence_fast.train.loss import ContrastiveLoss, ring_backend
from florence_fast.train.ring import ring_sigmoid_loss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
"""How open_clip's texts travel: from rank to rank in the first two, to all ranks at once in the others."""


class _OpenClipLoss(nn.Module):
    """What both losses have in common: the ranks that open_clip's constructors are told of, and tidy features."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def _check_group(self) -> None:
        """Raise unless the processes are those that the constructor was told of."""
        found = distributed.rank(), distributed.world_size()
        if found != (self.rank, self.world_size):
            raise ValueError(
                f"the loss was made for rank {self.rank} of {self.world_size}, and this process is rank {found[0]} of "
                f"{found[1]} of the default group"
            )

    def _equal_counts(self, rows: Tensor) -> list[int]:
        """Return how many rows every rank has, or raise if open_clip's mean over ranks would not be one over pairs."""
        counts = distributed.gather_counts(rows)
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank must bring the same number of pairs, got {counts}: "
                "florence_fast.train.ContrastiveLoss and SigmoidLoss take any"
            )
        return counts


class ClipLoss(_OpenClipLoss):
    """open_clip's ``ClipLoss``: half the sum of both cross-entropies of a pair's own text and image (CLIP).

    Values and gradients are open_clip's for each combination of flags, as the head of this module lists them, in
    float32 at least; open_clip holds B x B logits, or b x B twice with ``local_loss``, and this O(B D).

    Args:
        local_loss: return the loss of this rank's rows, not that of the joined batch.
        gather_with_grad: let other ranks send back the gradients of what they gathered.
        cache_labels: accepted; there are no labels to keep.
        rank: this process, as torch.distributed counts it.
        world_size: how many there are.
        use_horovod: refused.

    Raises:
        ValueError: ``use_horovod``, or a rank outside the world.

    ``local_loss`` without ``gather_with_grad`` warns among several ranks: its gradient is that of no loss, because what
    a feature does as a column of any rank, its own too, is left out. It is followed all the same.

    >>> loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    >>> loss(image_features, text_features, logit_scale, output_dict=True)["contrastive_loss"].backward()
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is refused: features travel through torch.distributed alone")
        if world_size > 1 and local_loss and not gather_with_grad:
            warnings.warn(
                "local_loss without gather_with_grad leaves out the gradients of all columns, as in open_clip: "
                "give gather_with_grad=True for those of the loss",
                stacklevel=2,
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, or ``{"contrastive_loss": loss}``.

        Args:
            image_features: (b, D), normalised.
            text_features: (b, D), normalised; row i belongs to image i.
            logit_scale: the factor of the cosines (not its log).
            logit_bias: changes nothing, as a softmax does not see what is added to all; its gradient is 0.

        Returns:
            A scalar: float32, or float64 for float64 features.

        Raises:
            ValueError: shapes, or ranks with other numbers of pairs under ``local_loss``, or another process group.
        """
        images, texts = _of_one_dtype(image_features, text_features)
        if self.world_size == 1:
            loss = contrastive_loss(images, texts, logit_scale)
        else:
            self._check_group()
            loss = (self._local_loss if self.local_loss else self._joined_loss)(images, texts, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # DistributedDataParallel raises for a parameter without a gradient
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        """Compute L; our own loss gives W dL to features, and to a rank's scale W times the rank's share of dL."""
        features, of_scale = (1.0, 1 / self.world_size) if self.gather_with_grad else (1 / self.world_size, 1.0)
        if isinstance(scale, Tensor):
            scale = _SumOfGradients.apply(scale, of_scale)
        return distributed.scale_gradient(ContrastiveLoss()(images, texts, scale), features)

    def _local_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        """Compute l_r: this rank's images against all texts, and its texts against all images."""
        counts = self._equal_counts(images)
        everyone = torch.arange(sum(counts), device=images.device)
        own = everyone.split(counts)[self.rank]
        if self.gather_with_grad:
            all_images, all_texts = (distributed.gather_features(x, None, counts) for x in (images, texts))
        else:
            all_images, all_texts = (distributed.all_gather_rows(x.detach(), counts) for x in (images, texts))
        options: dict[str, Any] = {"text_labels": everyone, "reduction": "image_to_text"}
        of_images = contrastive_loss(images, all_texts, scale, own, **options)
        return (of_images + contrastive_loss(texts, all_images, scale, own, **options)) / 2

    def extra_repr(self) -> str:
        flags = f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}"
        return f"{flags}, rank={self.rank}, world_size={self.world_size}"


class SigLipLoss(_OpenClipLoss):
    """open_clip's ``SigLipLoss``: each pair of an image and a text is judged alone (SigLIP, arXiv 2303.15343).

    A rank returns the loss of its own images against all texts. Values and gradients are open_clip's, in float32 at
    least and in O(B D) memory, O(b D) with "bidir" and "shift".

    Args:
        cache_labels: accepted; there are no labels to keep.
        rank: this process, as torch.distributed counts it.
        world_size: how many there are.
        dist_impl: how texts travel: "bidir" (the default) and "shift" in a ring, "reduce" and "gather" all at once.

    Raises:
        ValueError: an unknown ``dist_impl``, or a rank outside the world.

    >>> SigLipLoss()(image_features, text_features, logit_scale, logit_bias)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in DIST_IMPLS:
            raise unknown("dist_impl", dist_impl, DIST_IMPLS)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, or ``{"contrastive_loss": loss}``; ``logit_bias`` is added to every logit, None adds 0.

        The other arguments, the result and the errors are as in ``ClipLoss``.
        """
        images, texts = _of_one_dtype(image_features, text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = sigmoid_loss(images, texts, logit_scale, bias)
        else:
            self._check_group()
            loss = self._local_loss(images, texts, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _local_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
        """Compute l_r: this rank's images against all texts."""
        scale, bias = check_features(images, texts, scale, None), check_scalar("logit_bias", bias, images)
        counts = self._equal_counts(images)
        everyone = torch.arange(sum(counts), device=images.device)
        own = everyone.split(counts)[self.rank]
        if self.dist_impl in ("bidir", "shift"):
            backend = ring_backend("sigmoid_loss", images)
            options: dict[str, Any] = {"chunk_size": None, "backend": backend, "group": None}
            of_rows = ring_sigmoid_loss(images, texts, scale, bias, own, everyone, counts, **options)
        else:
            all_texts = distributed.gather_features(texts, None, counts)
            of_rows = sigmoid_loss_of_rows(images, all_texts, scale, bias, own, everyone)
        return of_rows.mean()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}"


def _of_one_dtype(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Bring features to the wider of both dtypes; under autocast one tower may end in float32 and the other not."""
    wider = torch.promote_types(images.dtype, texts.dtype)
    return images.to(wider), texts.to(wider)


class _SumOfGradients(torch.autograd.Function):
    """A value that every rank has, whose gradient is the sum of what the ranks send back, times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None]:
        dvalue = dvalue * ctx.factor
        dist.all_reduce(dvalue)
        return dvalue, None
