"""``ContrastiveLoss`` and ``SigmoidLoss`` over 1 to 4 processes against the loss of the joined batch in one, by value.

A rank's gradients are only right after the mean that DistributedDataParallel takes, so it is DDP that takes it here.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from florence_fast.ops import (
    contrastive_loss,
    contrastive_loss_reference,
    sigmoid_loss,
    sigmoid_loss_reference,
)
from florence_fast.train.loss import GATHERS, ContrastiveLoss, SigmoidLoss
from florence_fast.train.ring import circulate
from tests.train.toy import TwoTowers, assert_gradients_equal, batch, gradients

# id: (pairs of rank 0, 1, 2, 3; distinct labels, None for CLIP; reduction; chunk_size)
CASES = {
    "clip": ((3, 3, 3, 3), None, "mean_directions", None),
    "clip-unequal-sum": ((4, 1, 2, 3), None, "sum_directions", 3),
    "unicl": ((3, 3, 3, 3), 4, "mean_directions", None),
    "unicl-unequal-chunks": ((2, 5, 1, 4), 3, "mean_directions", 2),
    "unicl-empty-rank": ((4, 0, 3, 0), 3, "sum_directions", None),
}


def part_of(group: dist.ProcessGroup, case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return this rank's part of the joined batch: images, texts and labels."""
    counts, distinct, *_ = CASES[case]
    counts = counts[: dist.get_world_size(group)]
    images, texts, labels = (x.split(counts)[dist.get_rank(group)] for x in batch(sum(counts), distinct or 6))
    return images, texts, None if distinct is None else labels


def step(group: dist.ProcessGroup, case: str, gather: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of this rank through DDP: the loss and the gradients afterwards."""
    _, _, reduction, chunk_size = CASES[case]
    images, texts, labels = part_of(group, case)
    model = DistributedDataParallel(TwoTowers(), process_group=group)
    features = model(image=images, text=texts)
    loss = ContrastiveLoss(reduction, chunk_size, gather, process_group=group)(*features, labels)
    loss.backward()
    return loss.detach(), gradients(model)


def joined_step(world_size: int, case: str) -> tuple[Tensor, dict[str, Tensor]]:
    counts, distinct, reduction, _ = CASES[case]
    images, texts, labels = batch(sum(counts[:world_size]), distinct or 6)
    model = TwoTowers()
    features = model(image=images, text=texts)
    loss = contrastive_loss_reference(*features, None if distinct is None else labels, reduction=reduction)
    loss.backward()
    return loss.detach(), gradients(model)


def sigmoid_step(group: dist.ProcessGroup, case: str, gather: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of the sigmoid loss, whose bias no tower has: its gradient is averaged here."""
    images, texts, labels = part_of(group, case)
    model, bias = (
        DistributedDataParallel(TwoTowers(), process_group=group),
        torch.tensor(-2.0).double().requires_grad_(),
    )
    features = model(image=images, text=texts)
    loss = SigmoidLoss(CASES[case][3], gather, process_group=group)(*features, bias, labels)
    loss.backward()
    dist.all_reduce(bias.grad, group=group)
    return loss.detach(), bias.grad / dist.get_world_size(group), gradients(model)


def joined_sigmoid_step(world_size: int, case: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    counts, distinct, *_ = CASES[case]
    images, texts, labels = batch(sum(counts[:world_size]), distinct or 6)
    model, bias = TwoTowers(), torch.tensor(-2.0).double().requires_grad_()
    loss = sigmoid_loss_reference(*model(image=images, text=texts), bias, None if distinct is None else labels)
    loss.backward()
    return loss.detach(), bias.grad, gradients(model)


def refusal_of_nothing(group: dist.ProcessGroup) -> str:
    empty = torch.empty(0, 4)
    with pytest.raises(ValueError) as error:
        ContrastiveLoss(process_group=group)(empty, empty, 1.0)
    return str(error.value)


def blocks_seen(group: dist.ProcessGroup) -> list[tuple[int, list[float]]]:
    me = dist.get_rank(group)
    counts = [2, 0, 1][: dist.get_world_size(group)]
    return [
        (source, block.tolist()) for source, block in circulate(torch.full((counts[me],), float(me)), counts, group)
    ]


@pytest.mark.dist
@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_the_loss_and_the_gradients_of_the_joined_batch(processes, world_size, case, gather):
    loss, grads = joined_step(world_size, case)
    for got_loss, got_grads in processes.run(step, world_size, case, gather):
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=1e-12)
        assert_gradients_equal(got_grads, grads)


@pytest.mark.dist
@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("case", ["clip-unequal-sum", "unicl-empty-rank"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_sigmoid_loss_of_every_rank_is_that_of_the_joined_batch(processes, world_size, case, gather):
    loss, dbias, grads = joined_sigmoid_step(world_size, case)
    for got_loss, got_dbias, got_grads in processes.run(sigmoid_step, world_size, case, gather):
        torch.testing.assert_close((got_loss, got_dbias), (loss, dbias), rtol=1e-12, atol=1e-12)
        assert_gradients_equal(got_grads, grads)


def frozen_step(group: dist.ProcessGroup, gather: str, sigmoid: bool) -> list[Tensor | None]:
    """Rank 0 has frozen what makes its texts, rank 1 has no pair and plain tensors: the gradients of what wants one."""
    me, counts = dist.get_rank(group), (3, 0, 5)
    images, texts, _ = (x.split(counts)[me] for x in batch(sum(counts), 4))
    model = TwoTowers()
    images = model.visual(images) if counts[me] else torch.zeros(0, 8).double()
    texts = model.text(texts).detach().requires_grad_(me == 2) if counts[me] else torch.zeros(0, 8).double()
    bias = (0.5,) if sigmoid else ()
    loss = (SigmoidLoss if sigmoid else ContrastiveLoss)(gather=gather, process_group=group)
    loss(images, texts, 4.0, *bias).backward()
    return [model.visual[0].weight.grad, texts.grad if me == 2 else None]


@pytest.mark.dist
@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_a_rank_without_gradients_of_its_own_helps_the_others_to_theirs(processes, gather, sigmoid):
    results = processes.run(frozen_step, 3, gather, sigmoid)
    model, counts = TwoTowers(), (3, 0, 5)
    images, texts, _ = batch(sum(counts), 4)
    u, v = model.visual(images), model.text(texts).detach().requires_grad_()
    loss = sigmoid_loss_reference(u, v, 4.0, 0.5) if sigmoid else contrastive_loss_reference(u, v, 4.0)
    loss.backward()
    total = sum(grad for grad, _ in results if grad is not None) / 3
    torch.testing.assert_close(total, model.visual[0].weight.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(results[2][1] / 3, v.grad[3:], rtol=1e-11, atol=1e-12)


@pytest.mark.dist
def test_round_the_ring_every_rank_sees_the_block_of_each(processes):
    blocks = {0: [0.0, 0.0], 1: [], 2: [2.0]}
    for me, seen in enumerate(processes.run(blocks_seen, 3)):
        assert seen == [(source % 3, blocks[source % 3]) for source in (me, me - 1, me - 2)]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_that_is_empty_on_every_rank_is_refused(processes, world_size):
    for message in processes.run(refusal_of_nothing, world_size):
        assert message.startswith("image_features must hold at least one pair")


def test_alone_it_is_the_op():
    u, v, _ = TwoTowers()(*batch(6, 3)[:2])
    labels = batch(6, 3)[2]
    loss = ContrastiveLoss("sum_directions", chunk_size=2)
    assert loss(u, v, 5.0, labels) == contrastive_loss(u, v, 5.0, labels, reduction="sum_directions", chunk_size=2)
    assert loss(u, v, 5.0, output_dict=True) == {"contrastive_loss": loss(u, v, 5.0)}
    assert SigmoidLoss(chunk_size=2)(u, v, 5.0, -1.0, labels) == sigmoid_loss(u, v, 5.0, -1.0, labels, chunk_size=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gather": "rings"}, r"unknown gather 'rings' \(did you mean 'ring'"),
        ({"reduction": "mean"}, "unknown reduction 'mean'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_what_is_not_known_is_refused_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**arguments)
