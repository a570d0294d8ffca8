"""Losses between the rows of a rank and the columns of all, the columns of one rank at a time going round a ring.

A rank holds its own columns and those on their way to it, O(b D), where a gather holds all B. Each step computes on
the columns of one rank while the next ones travel; in the backward their gradient follows behind them, growing at
every rank, and comes home last.

Letters: W number of ranks · b rows of this rank · B of all ranks together · D embedding dim
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from florence_fast.ops.contrastive_loss import Statistics
from florence_fast.train.distributed import rank, world_size

Gradients = tuple[Tensor, ...]


def ring_statistics(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    row_labels: Tensor,
    all_labels: Tensor,
    weight: Tensor,
    counts: list[int],
    *,
    chunk_size: int | None,
    backend: str,
    group: dist.ProcessGroup | None,
) -> Statistics:
    """Return what ``ops.contrastive_loss.contrastive_statistics`` does, the columns being spread over the ranks.

    Args:
        rows: (b, D) of this rank.
        cols: (b, D) of this rank.
        all_labels: (B,), the columns' labels in the order of the ranks; ``counts`` says how many each rank holds.
        backend: "triton" or "torch", the same on all ranks or not.
    """
    return Statistics(
        *_RingStatistics.apply(
            rows, cols, scale, row_labels, all_labels, weight, counts, chunk_size or 0, backend, group
        )
    )


def ring_sigmoid_loss(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_labels: Tensor,
    all_labels: Tensor,
    counts: list[int],
    *,
    chunk_size: int | None,
    backend: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the sigmoid loss of each row over the columns of all ranks, (b,); arguments as in ``ring_statistics``."""
    return _RingSigmoidLoss.apply(
        rows, cols, scale, bias, row_labels, all_labels, counts, chunk_size or 0, backend, group
    )


def circulate(block: Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield every rank's block, the own one first, as (its rank, its rows); the next travels meanwhile.

    Args:
        block: (b, ...) of this rank.
        counts: the b of every rank.
    """
    me, size = rank(group), world_size(group)
    for step in range(size):
        source = (me - step) % size
        if step == size - 1:
            yield source, block
            return
        incoming = block.new_empty(counts[source - 1], *block.shape[1:])
        requests = _exchange(block, incoming, group)
        yield source, block
        _wait(requests)
        block = incoming


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None, "no process group"
    return dist.group.WORLD


def _exchange(outgoing: Tensor, incoming: Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Begin to send to the next rank and to receive from the one before; what holds no rows does not travel."""
    me, size = rank(group), world_size(group)
    after, before = (dist.get_global_rank(group or _world(), (me + step) % size) for step in (1, -1))
    transfers = [
        dist.P2POp(transfer, x, peer, group)
        for transfer, x, peer in ((dist.isend, outgoing, after), (dist.irecv, incoming, before))
        if x.numel()
    ]
    return dist.batch_isend_irecv(transfers) if transfers else []


def _wait(requests: list[dist.Work]) -> None:
    for request in requests:
        request.wait()


def _ring_gradients(
    cols: Tensor,
    counts: list[int],
    group: dist.ProcessGroup | None,
    gradients_of: Callable[[Tensor, slice], Gradients],
) -> list[Tensor]:
    """Sum the gradients of all blocks; that of the own columns comes back from the others.

    Args:
        gradients_of: ``(columns, their place among all) -> (drows, dcols, ...)`` of one block.

    Returns:
        The sums over the blocks, of at least float32, in the order of ``gradients_of``.
    """
    places = _places(counts)
    sums: list[Tensor] | None = None
    travelling: Tensor | None = None
    requests: list[dist.Work] = []
    for source, block in circulate(cols, counts, group):
        drows, dcols, *others = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in gradients_of(block, places[source])
        )
        own = [drows, *others]
        sums = own if sums is None else [x + y for x, y in zip(sums, own, strict=True)]
        _wait(requests)
        if travelling is not None:
            dcols = dcols + travelling
        travelling = dcols.new_empty(counts[source - 1], *dcols.shape[1:])
        requests = _exchange(dcols, travelling, group)
    _wait(requests)
    assert sums is not None and travelling is not None, "a ring has at least one block"
    return [sums[0], travelling, *sums[1:]]


def _places(counts: list[int]) -> list[slice]:
    ends = itertools.accumulate(counts)
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


class _RingStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        cols: Tensor,
        scale: Tensor,
        row_labels: Tensor,
        all_labels: Tensor,
        weight: Tensor,
        counts: list[int],
        chunk_size: int,
        backend: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        nothing = weight.new_full((len(rows),), -torch.inf)
        row_top, row_rest, positive = nothing, nothing, torch.zeros_like(nothing)
        col_top, col_rest = (weight.new_full((sum(counts),), -torch.inf) for _ in range(2))
        places = _places(counts)
        for source, block in circulate(cols.contiguous(), counts, group):
            if len(block) == 0:
                continue
            place = places[source]
            tensors = (rows, block, scale, row_labels, all_labels[place], weight)
            differentiable, tops, _ = torch.ops.florence_fast.contrastive_loss(*tensors, chunk_size, backend)
            block_rest, col_rest[place], block_positive = differentiable.split([len(rows), len(block), len(rows)])
            block_top, col_top[place] = tops.split([len(rows), len(block)])
            top = torch.maximum(row_top, block_top)
            row_rest = torch.logaddexp(row_top - top + row_rest, block_top - top + block_rest)
            row_top, positive = top, positive + block_positive
        ctx.save_for_backward(rows, cols, scale, row_labels, all_labels, weight, row_top + row_rest, col_top + col_rest)
        ctx.counts, ctx.values, ctx.group = counts, (chunk_size, backend), group
        ctx.mark_non_differentiable(row_top, col_top)
        return row_top, row_rest, col_top, col_rest, positive

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _: None, drow: Tensor, __: None, dcol: Tensor, dpositive: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, cols, scale, row_labels, all_labels, weight, row_lse, col_lse = ctx.saved_tensors
        # Every rank takes part in the ring, whether it wants this gradient or not.
        needs = [True] * 3 + [False] * 3

        def gradients_of(block: Tensor, place: slice) -> Gradients:
            lse = torch.cat([row_lse, col_lse[place]])
            grads = torch.ops.florence_fast.contrastive_loss_backward(
                torch.cat([drow, dcol[place], dpositive]),
                *(rows, block, scale, row_labels, all_labels[place], weight),
                *(lse, lse),
                needs,
                *ctx.values,
            )
            return grads[:3]

        grads = _ring_gradients(cols.contiguous(), ctx.counts, ctx.group, gradients_of)
        return *_in_dtypes(grads, (rows, cols, scale)), *(None,) * 7


class _RingSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        cols: Tensor,
        scale: Tensor,
        bias: Tensor,
        row_labels: Tensor,
        all_labels: Tensor,
        counts: list[int],
        chunk_size: int,
        backend: str,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        places = _places(counts)
        loss = rows.new_zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
        for source, block in circulate(cols.contiguous(), counts, group):
            tensors = (rows, block, scale, bias, row_labels, all_labels[places[source]])
            loss = loss + torch.ops.florence_fast.sigmoid_loss(*tensors, chunk_size, backend)
        ctx.save_for_backward(rows, cols, scale, bias, row_labels, all_labels)
        ctx.counts, ctx.values, ctx.group = counts, (chunk_size, backend), group
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, cols, scale, bias, row_labels, all_labels = ctx.saved_tensors
        needs = [True] * 4 + [False] * 2

        def gradients_of(block: Tensor, place: slice) -> Gradients:
            tensors = (rows, block, scale, bias, row_labels, all_labels[place])
            grads = torch.ops.florence_fast.sigmoid_loss_backward(dloss.contiguous(), *tensors, needs, *ctx.values)
            return grads[:4]

        grads = _ring_gradients(cols.contiguous(), ctx.counts, ctx.group, gradients_of)
        return *_in_dtypes(grads, (rows, cols, scale, bias)), *(None,) * 6


def _in_dtypes(grads: list[Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True))
