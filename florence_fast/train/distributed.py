"""Process groups started by torchrun, and differentiable collectives for a joint loss.

The rule of every differentiable collective here: all ranks compute the same objective, the loss of the whole
joined batch, and each rank's gradient is the derivative of that one number with respect to the rank's own tensor.
Ranks may bring different numbers of rows, none included.

Letters: W number of processes (ranks) · b rows of this rank · B rows of all ranks together
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from florence_fast.train.differences import differences, flat

T = TypeVar("T")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(backend: str | None = None, *, timeout_seconds: float = 600.0) -> torch.device:
    """Join the process group that torchrun describes in the environment, and return this rank's device.

    Args:
        backend: "nccl" or "gloo"; by default nccl where there is a CUDA device for this rank, gloo elsewhere.
        timeout_seconds: a collective that waits longer for another rank fails, so that a lost rank ends the run.

    Returns:
        ``cuda:LOCAL_RANK``, already made current, or ``cpu``. Outside torchrun nothing is joined.

    Raises:
        ValueError: some of torchrun's variables are set and others are not, or the timeout is not positive.

    >>> device = init_distributed()   # under `torchrun --nproc_per_node 2 train.py`, or alone
    """
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_device = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if has_device and backend != "gloo" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return device
    if missing:
        raise ValueError(f"torchrun sets {', '.join(TORCHRUN_VARIABLES)} together; missing here: {', '.join(missing)}")
    dist.init_process_group(
        backend or ("nccl" if device.type == "cuda" else "gloo"), timeout=timedelta(seconds=timeout_seconds)
    )
    return device


def is_distributed() -> bool:
    """Return whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return the rank of this process in ``group``, 0 when it runs alone."""
    return dist.get_rank(group) if is_distributed() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return how many processes ``group`` holds, 1 when this one runs alone."""
    return dist.get_world_size(group) if is_distributed() else 1


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank of ``group`` is here, at most the group's timeout; nothing when running alone."""
    if is_distributed():
        dist.barrier(group)


def on_rank_0(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 alone, and return what it returns, or raise what it raises, on every rank."""
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class RankMismatchError(ValueError):
    """The ranks of a run were started with different settings, models or data."""


def require_equal_on_ranks(facts: Mapping[str, Any]) -> None:
    """Compare ``facts`` with those of rank 0, and raise on every rank when some rank's differ.

    Args:
        facts: plain values by name; nested mappings and sequences are compared entry by entry.

    Raises:
        RankMismatchError: the message names a rank, the entries and both values.
    """
    if world_size() == 1:
        return
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, flat(facts))
    for number, theirs in enumerate(everyone):
        if differing := differences(everyone[0], theirs):
            told = "; ".join(f"{name} {a!r} on rank 0, {b!r} on rank {number}" for name, a, b in differing[:4])
            more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise RankMismatchError(f"all ranks of a run need the same command and data, got {told}{more}")


def all_gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Join the rows of all ranks in the order of the ranks, without a gradient.

    Args:
        rows: (b, ...), the same trailing shape and dtype on every rank.
        counts: the b of every rank, as ``gather_counts`` returns them.

    Returns:
        (B, ...), equal on every rank.
    """
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


def gather_counts(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """Return how many rows every rank holds, in the order of the ranks."""
    count = torch.tensor([len(rows)], device=rows.device)
    received = [torch.empty_like(count) for _ in range(world_size(group))]
    dist.all_gather(received, count, group=group)
    return torch.cat(received).tolist()


def gather_features(rows: Tensor, group: dist.ProcessGroup | None = None, counts: list[int] | None = None) -> Tensor:
    """Join the features of all ranks in the order of the ranks, with the exact gradient.

    A rank's features are used by every rank, so their gradient is the sum of what all ranks send back: one
    reduce-scatter in the backward pass. A gather that keeps only the own slice's gradient loses the other terms.

    Args:
        rows: (b, D), b may differ between ranks, D and the dtype may not.
        counts: the b of every rank, when the caller knows them already.

    Returns:
        (B, D), equal on every rank; ``rows`` itself when the process runs alone.

    >>> everyone = gather_features(torch.randn(4, 8))
    """
    if world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, gather_counts(rows, group) if counts is None else counts, group)


def sum_over_ranks(partial: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of every rank's ``partial``; the gradient passes through unchanged, as each rank owns one term."""
    return partial if world_size(group) == 1 else _SumOverRanks.apply(partial, group)


def logsumexp_over_ranks(top: Tensor, rest: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Return log sum_r exp(top_r + rest_r) over the ranks r in the same two parts: the greatest ``top``, and the rest.

    The gradient is all in the rest, and each rank's is weighted by its share of the sum.

    Args:
        top: any shape, equal on every rank; -inf where a rank has nothing to add. No gradient.
        rest: the same shape.
    """
    return (top, rest) if world_size(group) == 1 else _LogSumExpOverRanks.apply(top, rest, group)


def join_over_ranks(values: Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Join the values of all ranks where every rank then computes the same from them, with the exact gradient.

    Each rank has the whole derivative of what all compute: its own slice is its gradient, and nothing is sent back.

    Args:
        values: (b,) of this rank.
        counts: the b of every rank.
    """
    return values if world_size(group) == 1 else _JoinOverRanks.apply(values, counts, group)


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mean of every rank's ``value``, without a gradient; ``value`` itself when the process runs alone."""
    if world_size(group) == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total / world_size(group)


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


def scale_gradient(loss: Tensor, factor: float) -> Tensor:
    """Return ``loss`` unchanged, with its gradient multiplied by ``factor``."""
    return loss if factor == 1 else _ScaleGradient.apply(loss, factor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return all_gather_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = dgathered.new_zeros(len(ctx.counts), max(ctx.counts), *dgathered.shape[1:])
        for part, rows in zip(parts, dgathered.split(ctx.counts), strict=True):
            part[: len(rows)] = rows
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts), group=ctx.group)
        return own[: ctx.counts[rank(ctx.group)]], None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dtotal, None


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top: Tensor, rest: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        largest = top.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        share = (top - largest + rest).exp_()
        total = share.clone()
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(share / total)
        ctx.mark_non_differentiable(largest)
        return largest, total.log_()

    @staticmethod
    def backward(ctx: Any, _: None, drest: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (share,) = ctx.saved_tensors
        return None, drest * share, None


class _JoinOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.rank = counts, rank(group)
        return all_gather_rows(values, counts, group)

    @staticmethod
    def backward(ctx: Any, djoined: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return djoined.split(ctx.counts)[ctx.rank], None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dloss * ctx.factor, None
