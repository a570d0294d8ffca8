"""UniCL's bidirectional contrastive loss as a module, over the joined batch of all processes (paper section 2.2).

Letters: B pairs of all ranks together · b pairs of this rank · W number of ranks · D embedding dim
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from florence_fast.errors import unknown
from florence_fast.ops.contrastive_loss import (
    REDUCTIONS,
    check_contrastive_loss,
    contrastive_loss,
    contrastive_statistics,
    join_directions,
)
from florence_fast.train.distributed import (
    all_gather_rows,
    gather_counts,
    gather_features,
    logsumexp_over_ranks,
    rank,
    scale_gradient,
    sum_over_ranks,
    world_size,
)

GATHERS = ("all_gather",)


class ContrastiveLoss(nn.Module):
    """The loss of ``ops.contrastive_loss`` over the pairs of every process.

    Every rank returns the loss of the whole joined batch. Its gradients are W times that loss's derivative with
    respect to the rank's own features, and W times the rank's share of the scale's, so the mean over ranks that
    DistributedDataParallel takes is the exact gradient of the returned number, for unequal batches too.
    Each rank computes its own images against all texts once: texts travel once each way, and of the columns only
    B maxima and sums.

    Args:
        reduction: "mean_directions" (half the sum of both directions, as open_clip) or "sum_directions" (the paper).
        chunk_size: edge of the tiles of logits; by default the op chooses.
        gather: how features travel; "all_gather" holds the B texts of all ranks on each.
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
        super().__init__()
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        if gather not in GATHERS:
            raise unknown("gather", gather, GATHERS)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.reduction = reduction
        self.chunk_size = chunk_size
        self.gather = gather
        self.process_group = process_group

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
            loss = contrastive_loss(
                image_features,
                text_features,
                logit_scale,
                labels,
                reduction=self.reduction,
                chunk_size=self.chunk_size,
            )
        else:
            loss = self._joined_loss(image_features, text_features, logit_scale, labels)
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined_loss(self, images: Tensor, texts: Tensor, scale: Tensor | float, labels: Tensor | None) -> Tensor:
        group = self.process_group
        scale = check_contrastive_loss(images, texts, scale, labels, self.reduction, self.chunk_size, may_be_empty=True)
        counts = gather_counts(texts, group)
        first, total = sum(counts[: rank(group)]), sum(counts)
        if total == 0:
            raise ValueError("image_features must hold at least one pair on some rank, got none on any")
        if labels is None:
            all_labels = torch.arange(total, device=images.device)
            labels = all_labels[first : first + len(images)]
        else:
            all_labels = all_gather_rows(labels, counts, group)
        all_texts = gather_features(texts, group, counts)
        row_lse, col_lse, positive = contrastive_statistics(
            images, all_texts, scale, labels, all_labels, chunk_size=self.chunk_size
        )
        row_lse, positive = sum_over_ranks(torch.stack([row_lse.sum(), positive.sum()]), group) / total
        col_lse = logsumexp_over_ranks(col_lse, group).mean()
        return scale_gradient(join_directions(row_lse, col_lse, positive, self.reduction), world_size(group))

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, chunk_size={self.chunk_size}, gather={self.gather!r}"
