"""Contrastive losses as modules, over the joined batch of all processes (paper section 2.2; SigLIP).

Letters: B pairs of all ranks together · b pairs of this rank · W number of ranks · D embedding dim
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from florence_fast.errors import unknown
from florence_fast.ops import dispatch
from florence_fast.ops.contrastive_loss import (
    Statistics,
    check_reduction,
    contrastive_loss,
    contrastive_statistics,
    join_directions,
    positive_weight,
)
from florence_fast.ops.logits.checks import check_features, check_labels, check_scalar
from florence_fast.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_of_rows
from florence_fast.train.distributed import (
    all_gather_rows,
    gather_counts,
    gather_features,
    join_over_ranks,
    logsumexp_over_ranks,
    rank,
    scale_gradient,
    sum_over_ranks,
    world_size,
)
from florence_fast.train.ring import ring_sigmoid_loss, ring_statistics

GATHERS = ("all_gather", "ring")


class _JoinedLoss(nn.Module):
    """What losses over the pairs of every process have in common: each rank compares its own images with all texts."""

    def __init__(self, chunk_size: int | None, gather: str, process_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if gather not in GATHERS:
            raise unknown("gather", gather, GATHERS)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size
        self.gather = gather
        self.process_group = process_group

    def _count(self, texts: Tensor, *others: Tensor) -> tuple[list[int], Tensor]:
        """Return how many pairs every rank holds, and ``texts``, with a graph if any tensor of any rank has one.

        The backward pass exchanges the gradients of texts, and waits for every rank: one whose texts need none, because
        it holds no pair or has frozen what made them, takes part all the same.
        """
        counts = gather_counts(texts, self.process_group)
        if sum(counts) == 0:
            raise ValueError("image_features must hold at least one pair on some rank, got none on any")
        wanted = torch.tensor(float(torch.is_grad_enabled() and any(x.requires_grad for x in (texts, *others))))
        wanted = sum_over_ranks(wanted.to(texts.device), self.process_group)
        return counts, texts if texts.requires_grad or not wanted else texts.detach().requires_grad_()

    def _labels(self, texts: Tensor, labels: Tensor | None, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Return the labels of this rank's pairs and those of all."""
        if labels is None:
            everyone, me = torch.arange(sum(counts), device=texts.device), rank(self.process_group)
            return everyone.split(counts)[me], everyone
        return labels, all_gather_rows(labels, counts, self.process_group)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, gather={self.gather!r}"


class ContrastiveLoss(_JoinedLoss):
    """The loss of ``ops.contrastive_loss`` over the pairs of every process.

    Every rank returns the loss of the whole joined batch. Its gradients are W times that loss's derivative with
    respect to the rank's own features, and W times the rank's share of the scale's, so the mean over ranks that
    DistributedDataParallel takes is the exact gradient of the returned number, for unequal batches too.
    Of the columns only B maxima and sums are reduced over the ranks.

    Args:
        reduction: as in ``ops.contrastive_loss``: "mean_directions" (half the sum of both directions, as open_clip),
            "sum_directions" (the paper) or "image_to_text".
        chunk_size: edge of the tiles of logits; by default the op chooses.
        gather: how texts travel. "all_gather" holds the B of all ranks on each; "ring" those of one rank at a time.
        process_group: whose ranks join their batches; by default all.

    Raises:
        ValueError: a reduction or a gather that is not known, or a chunk size below 1.

    >>> loss = ContrastiveLoss()(image_features, text_features, logit_scale, labels)
    """

    def __init__(
        self,
        reduction: str = "mean_directions",
        chunk_size: int | None = None,
        gather: str = "all_gather",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(chunk_size, gather, process_group)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        labels: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of the joined batch, or ``{"contrastive_loss": loss}`` as open_clip does.

        Args:
            image_features: (b, D), normalised.
            text_features: (b, D), normalised; row i belongs to image i.
            logit_scale: the factor of the cosines (not its log).
            labels: (b,) int64 hashes of the texts, on all ranks or on none; None means that only a pair's own
                text is right (CLIP).

        Returns:
            A scalar, equal on every rank.

        Raises:
            ValueError: shapes or labels as in ``ops.contrastive_loss``; an empty joined batch.
        """
        if world_size(self.process_group) == 1:
            options = {"reduction": self.reduction, "chunk_size": self.chunk_size}
            loss = contrastive_loss(image_features, text_features, logit_scale, labels, **options)
        else:
            loss = self._joined_loss(image_features, text_features, logit_scale, labels)
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float, labels: Tensor | None) -> Tensor:
        group = self.process_group
        scale = check_features(images, texts, scale, self.chunk_size, may_be_empty=True)
        check_labels(images, texts, labels, None)
        counts, texts = self._count(texts, images, scale)
        labels, all_labels = self._labels(texts, labels, counts)
        weight = positive_weight(labels, all_labels, torch.promote_types(images.dtype, torch.float32))
        if self.gather == "ring":
            backend = ring_backend("contrastive_loss", images, texts, scale, labels)
            options = {"chunk_size": self.chunk_size, "backend": backend, "group": group}
            found = ring_statistics(images, texts, scale, labels, all_labels, weight, counts, **options)
        else:
            all_texts = gather_features(texts, group, counts)
            tensors = (images, all_texts, scale, labels, all_labels, weight)
            found = contrastive_statistics(*tensors, chunk_size=self.chunk_size)
        # From here on every rank computes the same: what rows know is joined, what columns know is reduced.
        of_rows = torch.stack([found.row_top, found.row_rest, found.positive], 1)
        row_top, row_rest, positive = join_over_ranks(of_rows, counts, group).unbind(1)
        col_top, col_rest = logsumexp_over_ranks(found.col_top, found.col_rest, group)
        everything = Statistics(row_top, row_rest, col_top, col_rest, positive)
        return scale_gradient(join_directions(everything, positive, self.reduction), world_size(group))

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, {super().extra_repr()}"


class SigmoidLoss(_JoinedLoss):
    """The loss of ``ops.sigmoid_loss`` (SigLIP) over the pairs of every process, with the gradients of all.

    Args:
        chunk_size: edge of the tiles of logits; by default the op chooses.
        gather: how texts travel, as in ``ContrastiveLoss``; "ring" is SigLIP's own way.
        process_group: whose ranks join their batches; by default all.

    Raises:
        ValueError: a gather that is not known, or a chunk size below 1.

    >>> loss = SigmoidLoss(gather="ring")(image_features, text_features, logit_scale, logit_bias)
    """

    def __init__(
        self,
        chunk_size: int | None = None,
        gather: str = "all_gather",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(chunk_size, gather, process_group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        labels: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of the joined batch, or ``{"contrastive_loss": loss}`` as open_clip does.

        Arguments, result and errors as in ``ContrastiveLoss``; ``logit_bias`` is added to every logit.
        """
        if world_size(self.process_group) == 1:
            tensors = (image_features, text_features, logit_scale, logit_bias, labels)
            loss = sigmoid_loss(*tensors, chunk_size=self.chunk_size)
        else:
            loss = self._joined_loss(image_features, text_features, logit_scale, logit_bias, labels)
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined_loss(
        self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float, labels: Tensor | None
    ) -> Tensor:
        group = self.process_group
        scale = check_features(images, texts, scale, self.chunk_size, may_be_empty=True)
        bias = check_scalar("logit_bias", bias, images)
        check_labels(images, texts, labels, None)
        counts, texts = self._count(texts, images, scale, bias)
        labels, all_labels = self._labels(texts, labels, counts)
        if self.gather == "ring":
            options = {"chunk_size": self.chunk_size, "backend": ring_backend("sigmoid_loss", images)}
            of_rows = ring_sigmoid_loss(images, texts, scale, bias, labels, all_labels, counts, group=group, **options)
        else:
            all_texts = gather_features(texts, group, counts)
            tensors = (images, all_texts, scale, bias, labels, all_labels)
            of_rows = sigmoid_loss_of_rows(*tensors, chunk_size=self.chunk_size)
        return scale_gradient(sum_over_ranks(of_rows.sum(), group) / sum(counts), world_size(group))


def ring_backend(op: str, *args: Tensor) -> str:
    """Return what computes the blocks of a ring; the definition knows no blocks, and the library stands in for it."""
    backend = dispatch.choose(op, *args)
    return "torch" if backend == "reference" else backend
