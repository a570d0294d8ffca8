"""Contrastive loss between images and texts: CLIP and UniCL."""

from florence_fast.ops.contrastive_loss.op import (
    Statistics,
    check_reduction,
    contrastive_loss,
    contrastive_loss_reference,
    contrastive_statistics,
    contrastive_statistics_reference,
    join_directions,
    positive_weight,
)

__all__ = [
    "Statistics",
    "check_reduction",
    "contrastive_loss",
    "contrastive_loss_reference",
    "contrastive_statistics",
    "contrastive_statistics_reference",
    "join_directions",
    "positive_weight",
]
