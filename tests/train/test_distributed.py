"""Collectives and their gradients against the same arithmetic in one process; joining a group as torchrun does.

Letters: W number of processes · b rows of one rank · B rows of all
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from florence_fast.train import distributed
from tests.train.processes import Processes

COUNTS = [2, 0, 3]
DIM = 4


def rows_of(rank: int) -> Tensor:
    return torch.randn(COUNTS[rank], DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def partial_of(rank: int) -> Tensor:
    """Three values a rank; the second one exists on rank 1 alone, the third is far larger on rank 2."""
    values = torch.tensor([0.5 * rank, 2.0 if rank == 1 else -torch.inf, 800.0 if rank == 2 else 0.0])
    return values.double()


def weights_of(rank: int) -> Tensor:
    """What a rank multiplies with the gathered rows: every rank asks for another gradient."""
    return torch.arange(sum(COUNTS) * DIM, dtype=torch.float64).view(-1, DIM) * (rank + 1) ** 2


def collectives(group: dist.ProcessGroup) -> dict[str, Tensor]:
    rank = distributed.rank(group)
    rows = rows_of(rank).requires_grad_()
    gathered = distributed.gather_features(rows, group)
    (gathered * weights_of(rank)).sum().backward()

    partial = partial_of(rank).requires_grad_()
    total = distributed.sum_over_ranks(partial[:1], group)
    top, rest = distributed.logsumexp_over_ranks(partial.detach(), partial - partial.detach().clamp_min(-1e3), group)
    (dsum,) = torch.autograd.grad((total * 3).sum(), partial)
    (djoined,) = torch.autograd.grad((rest * torch.tensor([1.0, 2.0, 3.0])).sum(), partial)
    same = distributed.join_over_ranks(rows, COUNTS, group)
    (dsame,) = torch.autograd.grad((same * weights_of(0)).sum(), rows)
    return {
        "counts": torch.tensor(distributed.gather_counts(rows, group)),
        "identity": torch.tensor([rank, distributed.world_size(group)]),
        "labels": distributed.all_gather_rows(torch.full((COUNTS[rank],), 2**62 + rank), COUNTS, group),
        "gathered": gathered.detach(),
        "drows": rows.grad,
        "total": total.detach(),
        "dsum": dsum,
        "joined": (top + rest).detach(),
        "same": same.detach(),
        "dsame": dsame,
        "djoined": djoined,
    }


@pytest.fixture(scope="module")
def results(processes: Processes) -> list[dict[str, Tensor]]:
    return processes.run(collectives, 3)


@pytest.mark.dist
def test_rows_arrive_in_the_order_of_the_ranks(results):
    for rank, result in enumerate(results):
        assert result["identity"].tolist() == [rank, 3]
        assert result["counts"].tolist() == COUNTS
        assert result["labels"].tolist() == [2**62] * 2 + [2**62 + 2] * 3
        assert torch.equal(result["gathered"], torch.cat([rows_of(r) for r in range(3)]))


@pytest.mark.dist
def test_gathered_rows_get_the_gradients_of_all_ranks(results):
    everything = sum(weights_of(rank) for rank in range(3)).split(COUNTS)
    for result, wanted in zip(results, everything, strict=True):
        torch.testing.assert_close(result["drows"], wanted, rtol=1e-14, atol=0)


@pytest.mark.dist
def test_sums_over_ranks_are_differentiated_as_one_number(results):
    for result in results:
        assert result["total"].tolist() == [1.5]
        assert result["dsum"].tolist() == [3.0, 0.0, 0.0]


@pytest.mark.dist
def test_logsumexp_over_ranks_weighs_each_rank_by_its_share(results):
    leaves = [partial_of(rank).requires_grad_() for rank in range(3)]
    joined = torch.stack(leaves).logsumexp(0)
    wanted = torch.autograd.grad((joined * torch.tensor([1.0, 2.0, 3.0])).sum(), leaves)
    for result, grad in zip(results, wanted, strict=True):
        torch.testing.assert_close(result["joined"], joined.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(result["djoined"], grad, rtol=1e-14, atol=0)


@pytest.mark.dist
def test_what_every_rank_computes_alike_needs_no_gradient_from_others(results):
    for result, wanted in zip(results, weights_of(0).split(COUNTS), strict=True):
        assert torch.equal(result["same"], torch.cat([rows_of(r) for r in range(3)]))
        assert torch.equal(result["dsame"], wanted)


def test_alone_nothing_is_sent_and_nothing_is_copied():
    x = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather_features(x) is x
    assert distributed.sum_over_ranks(x) is x and distributed.join_over_ranks(x, [3]) is x
    assert distributed.logsumexp_over_ranks(x, x) == (x, x)
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)
    distributed.barrier()


def test_scaled_gradients_leave_the_value():
    x = torch.tensor(2.0, requires_grad=True)
    y = distributed.scale_gradient(x * x, 3)
    y.backward()
    assert (y.item(), x.grad.item()) == (4.0, 12.0)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the only process of a torchrun; port 0 lets the system choose one."""
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_joins_the_group_that_torchrun_describes(torchrun):
    device = distributed.init_distributed("gloo", timeout_seconds=60)
    try:
        assert device == torch.device("cpu") and dist.get_backend() == "gloo"
        assert distributed.is_distributed() and distributed.world_size() == 1
        distributed.barrier()
    finally:
        dist.destroy_process_group()


def test_outside_torchrun_nothing_is_joined(torchrun):
    for name in distributed.TORCHRUN_VARIABLES:
        torchrun.delenv(name)
    assert distributed.init_distributed("gloo") == torch.device("cpu")
    assert not distributed.is_distributed()


def test_half_an_environment_is_refused(torchrun):
    torchrun.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="missing here: MASTER_PORT"):
        distributed.init_distributed("gloo")


def test_a_timeout_that_never_waits_is_refused():
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got 0"):
        distributed.init_distributed(timeout_seconds=0)
