"""``ClipLoss`` and ``SigLipLoss`` in four processes, each rank's value and gradients for every combination of flags.

Compared with a plain formula per rank, made in one process, and with open_clip's own classes where it is installed.
"""

import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from florence_fast.compat.open_clip import ClipLoss, SigLipLoss
from florence_fast.compat.open_clip.losses import DIST_IMPLS
from tests.train.processes import NUM_PROCESSES, Processes

PAIRS, DIM, SCALE, BIAS = 3, 8, 6.0, -2.0

CLIP_FLAGS = [(False, False), (False, True), (True, True), (True, False)]
# in float32 the kernels of this processor run
PRECISIONS = pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
CLIP_IDS = ["global", "global-with-grad", "local-with-grad", "local"]

Result = dict[str, Tensor]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()


def leaves_of(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a rank brings: normalised images and texts, scale and bias, each a leaf."""
    images, texts = torch.randn(2, PAIRS, DIM, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    tensors = {"images": F.normalize(images, dim=-1), "texts": F.normalize(texts, dim=-1)}
    tensors |= {"scale": torch.tensor(SCALE).double(), "bias": torch.tensor(BIAS).double()}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def step(loss: torch.nn.Module, rank: int, dtype: torch.dtype) -> Result:
    leaves = leaves_of(rank, dtype)
    value = loss(leaves["images"], leaves["texts"], leaves["scale"], leaves["bias"], output_dict=True)
    value = value["contrastive_loss"]
    (2 * value).backward()  # not 1, as a loss that is weighed or scaled by GradScaler
    return {"loss": value.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def run_losses(
    group: dist.ProcessGroup, theirs: bool, name: str, options: list[dict], dtype: torch.dtype
) -> list[Result]:
    """Run one class with each of ``options`` on this rank of the default group, which the two libraries speak in."""
    if theirs:
        from tests.compat.test_open_clip import load_open_clip

        kind = getattr(load_open_clip().loss, name)
    else:
        kind = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [step(kind(rank=rank, world_size=world_size, **flags), rank, dtype) for flags in options]


def plain_clip(rank: int, everyone: list[dict[str, Tensor]], local: bool, constant: bool) -> Tensor:
    """Return what a rank returns: L, or l of its rows; ``constant`` columns have no gradient."""
    images, texts = (torch.cat([leaves[name] for leaves in everyone]) for name in ("images", "texts"))
    own, scale = everyone[rank], everyone[rank]["scale"]
    labels = torch.arange(len(images))
    if not local:
        logits = scale * images @ texts.T
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    if constant:
        images, texts = images.detach(), texts.detach()
    labels = labels.split(PAIRS)[rank]
    of_images = F.cross_entropy(scale * own["images"] @ texts.T, labels)
    return (of_images + F.cross_entropy(scale * own["texts"] @ images.T, labels)) / 2


def plain_siglip(rank: int, everyone: list[dict[str, Tensor]]) -> Tensor:
    own, texts = everyone[rank], torch.cat([leaves["texts"] for leaves in everyone])
    logits = own["scale"] * own["images"] @ texts.T + own["bias"]
    right = torch.arange(len(texts)) == torch.arange(len(texts)).split(PAIRS)[rank][:, None]
    return -F.logsigmoid(torch.where(right, logits, -logits)).sum() / PAIRS


def plain(losses, received: str) -> list[Result]:
    """Return every rank's value and gradients; ``received``: from its own loss alone, or features from those of all."""
    results = []
    for rank in range(NUM_PROCESSES):
        everyone = [leaves_of(r) for r in range(NUM_PROCESSES)]
        own = list(everyone[rank].values())
        values = [losses(r, everyone) for r in range(NUM_PROCESSES)]
        grads = torch.autograd.grad(2 * values[rank], own, retain_graph=True, allow_unused=True)
        if received == "all":
            grads = (*torch.autograd.grad(2 * sum(values), own[:2], retain_graph=True), *grads[2:])
        grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, own, strict=True)]
        results.append({"loss": values[rank].detach(), **dict(zip(everyone[rank], grads, strict=True))})
    return results


def assert_equal(found: Result, expected: Result, rtol: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(), tensor.double(), rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def flags_of(local: bool, with_grad: bool) -> dict[str, bool]:
    return {"local_loss": local, "gather_with_grad": with_grad, "cache_labels": with_grad}


@pytest.mark.dist
@PRECISIONS
@pytest.mark.parametrize("local, with_grad", CLIP_FLAGS, ids=CLIP_IDS)
def test_clip_loss_of_every_rank_is_the_formula_of_its_flags(processes, local, with_grad, dtype, rtol):
    found = processes.run(run_losses, NUM_PROCESSES, False, "ClipLoss", [flags_of(local, with_grad)], dtype)
    constant = local and not with_grad
    expected = plain(lambda r, e: plain_clip(r, e, local, constant), "all" if with_grad else "own")
    for (ours,), formula in zip(found, expected, strict=True):
        assert_equal(ours, formula, rtol)


@pytest.mark.dist
@PRECISIONS
@pytest.mark.parametrize("dist_impl", [None, *DIST_IMPLS])
def test_siglip_loss_of_every_rank_is_the_formula(processes, dist_impl, dtype, rtol):
    found = processes.run(run_losses, NUM_PROCESSES, False, "SigLipLoss", [{"dist_impl": dist_impl}], dtype)
    for (ours,), formula in zip(found, plain(plain_siglip, "all"), strict=True):
        assert_equal(ours, formula, rtol)


@pytest.mark.dist
@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
@PRECISIONS
@pytest.mark.parametrize(
    "name, options",
    [
        ("ClipLoss", [flags_of(*flags) for flags in CLIP_FLAGS]),
        ("SigLipLoss", [{"dist_impl": impl} for impl in (None, *DIST_IMPLS)]),
    ],
    ids=["clip", "siglip"],
)
def test_every_rank_has_the_value_and_the_gradients_of_open_clip(processes, name, options, dtype, rtol):
    theirs = processes.run(run_losses, NUM_PROCESSES, True, name, options, dtype)
    ours = processes.run(run_losses, NUM_PROCESSES, False, name, options, dtype)
    for found_of_rank, expected_of_rank in zip(ours, theirs, strict=True):
        for found, expected in zip(found_of_rank, expected_of_rank, strict=True):
            assert_equal(found, expected, rtol)


def refusals(group: dist.ProcessGroup) -> list[str]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    features = F.normalize(torch.ones(1 + rank % 2, 4), dim=-1)
    messages = []
    for loss, *bias in (
        (ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size),),
        (SigLipLoss(rank=rank, world_size=world_size), 0.0),
        (ClipLoss(rank=0, world_size=world_size + 1),),
    ):
        with pytest.raises(ValueError) as error:
            loss(features, features, 1.0, *bias)
        messages.append(str(error.value))
    return messages


@pytest.mark.dist
def test_unequal_ranks_and_other_groups_are_refused_on_every_rank(processes):
    for rank, (clip, siglip, group) in enumerate(processes.run(refusals, NUM_PROCESSES)):
        assert clip == siglip and "same number of pairs, got [1, 2, 1, 2]" in clip
        assert f"made for rank 0 of 5, and this process is rank {rank} of 4" in group


def unequal_global(group: dist.ProcessGroup) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pairs = torch.eye(10).split([1, 2, 3, 4])[rank]
    return ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)(pairs, pairs, 3.0).item()


@pytest.mark.dist
def test_the_loss_of_the_joined_batch_takes_unequal_ranks(processes):
    expected = F.cross_entropy(3 * torch.eye(10), torch.arange(10)).item()
    assert processes.run(unequal_global, NUM_PROCESSES) == pytest.approx([expected] * NUM_PROCESSES, rel=1e-6)
