"""``GradCache`` against one graph over the same features: equal to 1e-12, random masks, labels and DDP included.

Letters: B pairs · T distinct texts
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from florence_fast.ops import contrastive_loss_reference
from florence_fast.train.grad_cache import GradCache
from florence_fast.train.loss import ContrastiveLoss
from tests.train.toy import TwoTowers, assert_gradients_equal, batch, gradients

SEED = 11


def even_parts(x: Tensor, count: int) -> list[Tensor]:
    """The rows that the cache deals to each micro-batch, some of them perhaps none."""
    bounds = [len(x) * part // count for part in range(count + 1)]
    return [x[start:end] for start, end in itertools.pairwise(bounds)]


def one_graph(model: nn.Module, images: Tensor, texts: Tensor, micro_batch_size: int) -> list[Tensor]:
    """Features as the cache computes them, part by part with the same random masks, but all in one graph."""
    count = math.ceil(max(len(images), len(texts)) / micro_batch_size)
    torch.manual_seed(SEED)
    features = [
        model(image=image if len(image) else None, text=text if len(text) else None)
        for image, text in zip(even_parts(images, count), even_parts(texts, count), strict=True)
    ]
    return [torch.cat([x for x in column if x is not None]) for column in list(zip(*features, strict=True))[:2]]


def distinct_texts(texts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each text once and, for every pair, which one is its own."""
    _, text_index = labels.unique(return_inverse=True)
    first = [int((text_index == row).nonzero()[0]) for row in range(int(text_index.max()) + 1)]
    return texts[first], text_index


def loss_of_distinct_texts(text_index: Tensor, **options: Any) -> Callable[..., Tensor]:
    """Spread the features of distinct texts over the images that share them."""
    loss = ContrastiveLoss(**options)
    return lambda u, v, scale, labels: loss(u, v.index_select(0, text_index), scale, labels)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7, 100], ids=lambda size: f"micro-batch-{size}")
def test_gradients_are_those_of_one_graph_with_drop_path_and_labels(micro_batch_size):
    images, texts, labels = batch(7, 4)
    texts, text_index = distinct_texts(texts, labels)
    model, other = TwoTowers(drop_path=0.5), TwoTowers(drop_path=0.5)
    torch.manual_seed(SEED)
    loss = GradCache(model, loss_of_distinct_texts(text_index), micro_batch_size).step(images, texts, labels=labels)

    u, v = one_graph(other, images, texts, micro_batch_size)
    wanted = contrastive_loss_reference(u, v[text_index], other.logit_scale.exp(), labels)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    assert not loss.requires_grad
    assert_gradients_equal(gradients(model), gradients(other))
    assert all(max(call) <= micro_batch_size for call in model.calls)


def test_gradients_are_those_of_the_whole_batch_and_are_added_to_what_is_there():
    images, texts, labels = batch(8, 5)
    model, other = TwoTowers(), TwoTowers()
    cache = GradCache(model, ContrastiveLoss("sum_directions"), 3)
    losses = [cache.step(images, texts), cache.step(images, texts, labels=labels)]
    wanted = [contrastive_loss_reference(*other(images, texts), y, reduction="sum_directions") for y in (None, labels)]
    sum(wanted).backward()
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted).detach(), rtol=1e-12, atol=0)
    assert_gradients_equal(gradients(model), gradients(other))


def test_one_text_for_all_images_reaches_the_last_micro_batch():
    images, texts, labels = batch(5, 1)
    model = TwoTowers()
    GradCache(model, loss_of_distinct_texts(torch.zeros_like(labels)), 2).step(images, texts[:1], labels=labels)
    assert model.calls == [(1, 0), (2, 0), (2, 1)] * 2


def test_the_generator_ends_where_forward_and_loss_leave_it():
    images, texts, _ = batch(6, 4)
    model = TwoTowers(drop_path=0.5)

    def loss_that_draws(u: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss_reference(u, v, scale) * torch.rand(())

    torch.manual_seed(SEED)
    GradCache(model, loss_that_draws, 2).step(images, texts)
    after = torch.rand(3)
    u, v = one_graph(model, images, texts, 2)
    loss_that_draws(u, v, model.logit_scale.exp())
    assert torch.equal(after, torch.rand(3))


@pytest.mark.gpu
def test_masks_of_a_cuda_device_are_replayed():
    images, texts, labels = (x.cuda() for x in batch(7, 4))
    model, other = TwoTowers(drop_path=0.5).cuda(), TwoTowers(drop_path=0.5).cuda()
    torch.manual_seed(SEED)
    GradCache(model, ContrastiveLoss(), 3).step(images, texts, labels=labels)
    u, v = one_graph(other, images, texts, 3)
    contrastive_loss_reference(u, v, other.logit_scale.exp(), labels).backward()
    assert_gradients_equal(gradients(model), gradients(other))


def test_under_autocast_every_weight_gets_its_gradient():
    images, texts, labels = (x.float() if x.is_floating_point() else x for x in batch(8, 5))
    model, other = TwoTowers(dtype=torch.float32), TwoTowers(dtype=torch.float32)
    seen = []

    def loss(u: Tensor, v: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        seen.extend([u.dtype, v.dtype])
        return ContrastiveLoss()(u, v, scale, y)

    with torch.autocast("cpu", torch.bfloat16):
        GradCache(model, loss, 4).step(images, texts, labels=labels)
    # Without its cache autocast adds the gradients of a weight's uses in fp32, as separate backward passes do.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        u, v = one_graph(other, images, texts, 4)
    contrastive_loss_reference(u.float(), v.float(), other.logit_scale.exp(), labels).backward()
    assert seen == [torch.float32] * 2
    assert_gradients_equal(gradients(model), gradients(other), tolerance=1e-6)


def test_casts_of_the_first_pass_are_dropped_before_the_second(monkeypatch):
    images, texts, _ = (x.float() for x in batch(6, 4))
    model, calls_before = TwoTowers(dtype=torch.float32), []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: calls_before.append(len(model.calls)))
    with torch.autocast("cpu", torch.bfloat16):
        GradCache(model, ContrastiveLoss(), 3).step(images, texts)
        assert calls_before == [2] and len(model.calls) == 4


def test_what_leaves_autocast_forward_stays_outside_it_backward():
    class FullPrecision(TwoTowers):
        def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor | None, ...]:
            with torch.autocast("cpu", enabled=False):
                return super().forward(image, text)

    images, texts, labels = (x.float() if x.is_floating_point() else x for x in batch(8, 5))
    model, other = FullPrecision(dtype=torch.float32), TwoTowers(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        GradCache(model, contrastive_loss_reference, 4).step(images, texts, labels=labels)
    contrastive_loss_reference(*other(images, texts), labels).backward()
    assert_gradients_equal(gradients(model), gradients(other), tolerance=2e-6)


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda loss: loss * factor


@pytest.mark.parametrize("scale", [256.0, scaled(256.0)], ids=["number", "callable"])
def test_the_scale_multiplies_gradients_and_not_the_loss(scale):
    images, texts, labels = batch(6, 4)
    model, other = TwoTowers(), TwoTowers()
    loss = GradCache(model, ContrastiveLoss(), 4).step(images, texts, labels=labels, scale=scale)
    wanted = contrastive_loss_reference(*other(images, texts), labels)
    (wanted * 256).backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    assert_gradients_equal(gradients(model), gradients(other))


@pytest.mark.parametrize("frozen", ["visual", "text"])
def test_a_frozen_tower_gets_nothing_and_the_other_everything(frozen):
    images, texts, _ = batch(6, 4)
    model, other = TwoTowers(), TwoTowers()
    for encoder in (model, other):
        encoder.get_submodule(frozen).requires_grad_(False)
    GradCache(model, ContrastiveLoss(), 2).step(images, texts)
    contrastive_loss_reference(*other(images, texts)).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == name.startswith(frozen)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_any_loss_on_embeddings_will_do():
    images, texts, _ = batch(6, 4)
    model, other = TwoTowers(), TwoTowers()

    def distance(u: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return scale * (u @ v.T).square().sum() + (u - v).square().sum()

    GradCache(model, distance, 4).step(images, texts)
    distance(*other(images, texts)).backward()
    assert_gradients_equal(gradients(model), gradients(other))


def test_a_loss_may_leave_the_scale_alone():
    images, texts, _ = batch(6, 4)
    model, other = TwoTowers(), TwoTowers()

    def distance(u: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return (u - v).square().sum()

    GradCache(model, distance, 4).step(images, texts)
    distance(*other(images, texts)).backward()
    assert model.logit_scale.grad == 0
    for tower in ("visual", "text"):
        got, wanted = (gradients(encoder.get_submodule(tower)) for encoder in (model, other))
        assert_gradients_equal(got, wanted)


COUNTS, MICRO_BATCH_SIZE = (7, 4), 2
"""Pairs of each rank: four micro-batches on the first, two on the second."""


def step_with_ddp(group: dist.ProcessGroup) -> tuple[Tensor, dict[str, Tensor], int]:
    rank = dist.get_rank(group)
    images, texts, labels = (x.split(COUNTS)[rank] for x in batch(sum(COUNTS), 4))
    texts, text_index = distinct_texts(texts, labels)
    model = DistributedDataParallel(TwoTowers(drop_path=0.5), process_group=group)
    all_reduces = []

    def counted(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        all_reduces.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / dist.get_world_size(group))

    model.register_comm_hook(None, counted)
    cache = GradCache(model, loss_of_distinct_texts(text_index, process_group=group), MICRO_BATCH_SIZE)
    for _ in range(2):  # the second step shows that the first left no reduction unfinished
        model.zero_grad()
        torch.manual_seed(SEED)
        loss = cache.step(images, texts, labels=labels)
    return loss, gradients(model), len(all_reduces)


@pytest.mark.dist
def test_with_ddp_gradients_are_exact_and_reduced_once_a_step(processes):
    results = processes.run(step_with_ddp, len(COUNTS))
    model = TwoTowers(drop_path=0.5)
    images, texts, labels = batch(sum(COUNTS), 4)
    features = []
    for x, t, y in zip(images.split(COUNTS), texts.split(COUNTS), labels.split(COUNTS), strict=True):
        t, text_index = distinct_texts(t, y)
        u, v = one_graph(model, x, t, MICRO_BATCH_SIZE)
        features.append((u, v[text_index]))
    u, v = (torch.cat(column) for column in zip(*features, strict=True))
    wanted = contrastive_loss_reference(u, v, model.logit_scale.exp(), labels)
    wanted.backward()
    for loss, grads, all_reduces in results:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        assert_gradients_equal(grads, gradients(model))
        assert all_reduces == 2, "one bucket, two steps"


class Calls(TorchDispatchMode):
    """Lists the names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def step_with_fsdp(group: dist.ProcessGroup, counts: tuple[int, int], drop_path: float, parts: int) -> tuple:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    images, texts, labels = (x.split(counts)[rank] for x in batch(sum(counts), 4))
    model = TwoTowers(drop_path)
    # FSDP2 takes no parameter without axes: whoever trains reduces the gradient of the scale.
    for module in (model.visual, model.text, model) if parts == 2 else (model,):
        fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"), ignored_params={model.logit_scale})
    with torch.no_grad():  # an evaluation, which leaves the outermost weights gathered
        model(images, texts)
    cache = GradCache(model, ContrastiveLoss(process_group=group), MICRO_BATCH_SIZE)
    with Calls() as calls:
        torch.manual_seed(SEED)
        loss = cache.step(images, texts, labels=labels)
    reductions = calls.names.count("c10d::_reduce_scatter_base_")
    dist.all_reduce(model.logit_scale.grad, group=group)
    model.logit_scale.grad /= size
    whole = {name: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for name, p in model.named_parameters()}
    return loss, whole, reductions


@pytest.mark.dist
@pytest.mark.parametrize(
    "counts, sizes, drop_path, parts",
    [((7, 4), (2, 1), 0.5, 2), ((7, 2), (2, 1), 0.0, 2), ((7, 4), (2, 1), 0.5, 1)],
    ids=["four-parts-on-each", "fewer-rows-than-parts", "the-whole-model-at-once"],
)
def test_with_fsdp_gradients_are_exact_and_reduced_once_a_step(processes, counts, sizes, drop_path, parts):
    """Both ranks run four parts, though the second has rows for two or for fewer parts alone."""
    results = processes.run(step_with_fsdp, 2, counts, drop_path, parts)
    model = TwoTowers(drop_path)
    images, texts, labels = batch(sum(counts), 4)
    ranks = zip(images.split(counts), texts.split(counts), sizes, strict=True)
    u, v = (torch.cat(column) for column in zip(*(one_graph(model, *rows) for rows in ranks), strict=True))
    wanted = contrastive_loss_reference(u, v, model.logit_scale.exp(), labels)
    wanted.backward()
    for loss, grads, reductions in results:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        assert_gradients_equal(grads, gradients(model))
        assert reductions == parts, "so many groups of parameters, one step"


class Checkpointed(TwoTowers):
    """Two towers that keep no activations and compute them again for the backward."""

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return checkpoint(super().forward, image, text, use_reentrant=False)


def test_with_activation_checkpointing_gradients_and_masks_are_the_same():
    images, texts, labels = batch(7, 4)
    model, other = Checkpointed(drop_path=0.5), TwoTowers(drop_path=0.5)
    losses = []
    for encoder in (model, other):
        torch.manual_seed(SEED)
        losses.append(GradCache(encoder, ContrastiveLoss(), 3).step(images, texts, labels=labels))
    assert losses[0] == losses[1]
    assert len(model.calls) == 3 + 2 * 3, "the first pass has no graph, the second runs every part twice"
    assert_gradients_equal(gradients(model), gradients(other))


def test_a_grad_scaler_finds_the_gradients_scaled_and_unscales_them():
    images, texts, labels = batch(6, 4)
    model, other = TwoTowers(), TwoTowers()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.0)
    GradCache(model, ContrastiveLoss(), 4).step(images, texts, labels=labels, scale=scaler.scale)
    contrastive_loss_reference(*other(images, texts), labels).backward()
    assert_gradients_equal({n: x / 1024 for n, x in gradients(model).items()}, gradients(other))
    scaler.unscale_(optimizer)
    assert_gradients_equal(gradients(model), gradients(other))


class ThreeTowers(TwoTowers):
    """A third tower sees depth, of other rows than the images."""

    def __init__(self) -> None:
        super().__init__(drop_path=0.5)
        self.depth = copy.deepcopy(self.visual)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, depth: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        images, texts, scale = super().forward(image, text)
        return images, texts, None if depth is None else self.depth(depth), scale, scale.log()


def test_any_number_of_towers_with_any_number_of_rows():
    images, texts, labels = batch(7, 4)
    depth = batch(5, 4, seed=9)[0]
    model, other = ThreeTowers(), ThreeTowers()

    def loss(u: Tensor, v: Tensor, w: Tensor, scale: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return contrastive_loss_reference(u, v, scale, y) + (u[:5] - w).square().sum() * bias

    torch.manual_seed(SEED)
    cache = GradCache(model, loss, 3, towers=("image", "text", "depth"))
    got = cache.step(images, texts, depth, labels=labels)
    torch.manual_seed(SEED)
    parts = zip(*(even_parts(x, 3) for x in (images, texts, depth)), strict=True)
    outputs = [other(*part) for part in parts]
    features = [torch.cat(column) for column in list(zip(*outputs, strict=True))[:3]]
    wanted = loss(*features, *outputs[0][3:], labels)
    wanted.backward()
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-12, atol=0)
    assert_gradients_equal(gradients(model), gradients(other))


IMAGES, TEXTS, LABELS = batch(4, 3)
BAD = {
    "empty": ((IMAGES[:0], TEXTS[:0]), r"image must hold at least one row, got shape \(0, 6\)"),
    "no-texts": ((IMAGES, TEXTS[:0]), r"text must hold at least one row, got shape \(0, 5\)"),
    "labels-as-an-input": ((IMAGES, TEXTS, LABELS), "inputs must be one for each of image, text, got 3"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_before_the_model_runs(arguments, message):
    model = TwoTowers()
    with pytest.raises(ValueError, match=message):
        GradCache(model, ContrastiveLoss(), 2).step(*arguments)
    assert model.calls == []


@pytest.mark.parametrize("towers", ["image", ()], ids=["string", "none"])
def test_towers_are_names(towers):
    with pytest.raises(ValueError, match="towers must name at least one input of the model"):
        GradCache(TwoTowers(), ContrastiveLoss(), 2, towers=towers)


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_micro_batch_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match="micro_batch_size must be a positive int"):
        GradCache(TwoTowers(), ContrastiveLoss(), size)
