"""Gradient cache: the exact gradient of a large contrastive batch in the memory of a small one (section 2.2).

A contrastive loss needs the features of the whole batch, but the towers' activations of only one part at a time:
features without a graph, the loss and its gradient on the features, then each part forward once more and backward
with the gradient that was kept. It costs one more forward, and nothing in exactness (Gao et al., arXiv 2101.06983).

Letters: B rows of an input
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from florence_fast.ranges import annotated

Loss = Callable[..., Tensor]
Scale = float | Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """The rows of one micro-batch."""

    inputs: tuple[Tensor | None, ...]
    """One for each tower."""
    lengths: tuple[int, ...]
    """How many rows of each input count. Under FSDP2 an input without rows has one that does not count."""


class GradCache:
    """Run forward and backward of encoders in micro-batches, with the gradient of the whole batch.

    The model is only ever called as ``model(image=..., text=...)``, with the names of ``towers`` and some of them None.
    It returns the features of each tower in that order, then any scalars that the loss takes, such as the scale. So
    wrappers such as DistributedDataParallel and FSDP2 see every pass; their gradients are synchronised once, in the
    last micro-batch. FSDP2 takes no parameter without axes: whoever names a model's scale in its ``ignored_params``
    averages its gradient over the ranks. The second pass replays the random generators of the CPU and of the inputs'
    devices, so drop path and dropout draw the masks of the first. Forward passes run under the autocast that surrounds
    the call, backward passes outside it. Activation checkpointing inside the model needs nothing from here.

    What computes across a micro-batch (batch normalisation) sees micro-batches, and updates its statistics twice.

    Args:
        model: the encoders, wrapped or not.
        loss: ``loss(*features, *scalars)`` or, with labels, ``loss(*features, *scalars, labels)`` -> scalar. Features
            are those of the whole batch, float32 or better; what happens to them is the loss's affair, such as
            spreading texts that were encoded once over the images that share them.
        micro_batch_size: the most rows of one tower in one forward pass.
        towers: what the model calls its inputs.

    Raises:
        ValueError: micro_batch_size is not a positive int, or there are no towers.

    >>> cache = GradCache(model, ContrastiveLoss(), micro_batch_size=64)
    >>> loss = cache.step(images, tokens, labels=labels)
    >>> optimizer.step()
    """

    def __init__(
        self, model: nn.Module, loss: Loss, micro_batch_size: int, *, towers: Sequence[str] = ("image", "text")
    ) -> None:
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be a positive int, got {micro_batch_size!r}")
        if isinstance(towers, str) or not towers:
            raise ValueError(f"towers must name at least one input of the model, got {towers!r}")
        self.model = model
        self.loss = loss
        self.micro_batch_size = micro_batch_size
        self.towers = tuple(towers)

    def step(self, *inputs: Tensor, labels: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
        """Add the gradients of the batch's loss to the parameters' ``grad``.

        Args:
            inputs: one (B, ...) for each of ``towers``; B may differ between them.
            labels: handed on to the loss as they are.
            scale: what the loss is multiplied with before the backward pass; ``scaler.scale`` of a GradScaler.

        Returns:
            The loss, not scaled, without a graph.

        Raises:
            ValueError: other inputs than towers, or one without rows.
        """
        if len(inputs) != len(self.towers):
            raise ValueError(f"inputs must be one for each of {', '.join(self.towers)}, got {len(inputs)}")
        for name, x in zip(self.towers, inputs, strict=True):
            if len(x) == 0:
                raise ValueError(f"{name} must hold at least one row, got shape {tuple(x.shape)}")
        parts = self._parts(inputs)
        states, outputs = self._first_pass(parts)
        loss, gradients = self._loss_and_gradients(outputs, labels, scale)
        self._second_pass(parts, states, gradients)
        return loss

    def _parts(self, inputs: tuple[Tensor, ...]) -> list[Part]:
        """Deal every input evenly, at least one row of each to the last part: there DDP waits for every parameter."""
        count = -(-max(map(len, inputs)) // self.micro_batch_size)
        if self._is_fsdp:
            count = _greatest_of_ranks(count, self.model)
        columns = [_cut(x, count) for x in inputs]
        parts = []
        for rows in zip(*columns, strict=True):
            # FSDP2 gathers weights in every forward and backward: no rank may leave a tower out.
            kept = [
                x if len(x) else whole[:1] if self._is_fsdp else None for x, whole in zip(rows, inputs, strict=True)
            ]
            parts.append(Part(tuple(kept), tuple(map(len, rows))))
        return parts

    @annotated("grad_cache.forward")
    def _forward(self, part: Part) -> tuple[Tensor | None, ...]:
        return tuple(self.model(**dict(zip(self.towers, part.inputs, strict=True))))

    @property
    def _is_fsdp(self) -> bool:
        return hasattr(self.model, "set_requires_gradient_sync")

    @annotated("grad_cache.first_pass")
    @torch.no_grad()
    def _first_pass(self, parts: list[Part]) -> tuple[list["_RandomState"], list[Tensor]]:
        """Return the random state before each part, and the features of the whole batch followed by the scalars."""
        states, outputs = [], []
        for part in parts:
            states.append(_RandomState(*part.inputs))
            outputs.append(self._forward(part))
        # Older torch keeps the weights that autocast has cast here, without a graph: used again, they would get no
        # gradient (pytorch pull request 165068).
        torch.clear_autocast_cache()
        lengths = zip(*(part.lengths for part in parts), strict=True)
        features = [
            torch.cat([x[:length] for x, length in zip(column, counted, strict=True) if x is not None])
            for column, counted in zip(zip(*outputs, strict=True), lengths, strict=False)
        ]
        return states, [*features, *outputs[-1][len(self.towers) :]]

    @annotated("grad_cache.loss")
    def _loss_and_gradients(
        self, outputs: list[Tensor], labels: Tensor | None, scale: Scale
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and its gradients for ``outputs`` in their dtypes, summed in at least float32."""
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in outputs]
        loss = self.loss(*leaves, *([] if labels is None else [labels]))
        scaled = scale(loss) if callable(scale) else loss * scale
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(scaled, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), [grad.to(x.dtype) for grad, x in zip(gradients, outputs, strict=True)]

    @annotated("grad_cache.second_pass")
    def _second_pass(self, parts: list[Part], states: list["_RandomState"], gradients: list[Tensor]) -> None:
        """Run every part forward with its masks of the first pass, and backward with its rows of ``gradients``."""
        features, scalars = gradients[: len(self.towers)], gradients[len(self.towers) :]
        lengths = zip(*(part.lengths for part in parts), strict=True)
        rows = list(zip(*(grad.split(counted) for grad, counted in zip(features, lengths, strict=True)), strict=True))
        with torch.random.fork_rng(devices=states[0].devices):
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                states[number].restore()
                with self._synchronised(last):
                    _backward(self._forward(part), (*rows[number], *(scalars if last else [None] * len(scalars))))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which the wrapper's processes exchange gradients only if this is the last part."""
        if self._is_fsdp and not last:
            return _without_gradient_sync(cast(FSDPModule, self.model))
        no_sync = cast("Callable[[], AbstractContextManager[Any]] | None", getattr(self.model, "no_sync", None))
        return nullcontext() if last or no_sync is None else no_sync()


class _RandomState:
    """The state of torch's generators on the CPU and on the devices of some tensors."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.devices = sorted({x.device.index for x in tensors if x is not None and x.is_cuda})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@annotated("grad_cache.backward")
def _backward(outputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
    """Go backward from those outputs that have a gradient to pass on; a frozen tower has none.

    A row that does not count gets zeros.
    """
    pairs = [
        (output, gradient if gradient.shape == output.shape else torch.zeros_like(output))
        for output, gradient in zip(outputs, gradients, strict=True)
        if output is not None and gradient is not None and output.requires_grad
    ]
    if pairs:
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            graded, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(graded, gradients)


def _cut(x: Tensor, count: int) -> list[Tensor]:
    """Cut ``x`` into ``count`` even parts, the last never empty."""
    bounds = [len(x) * part // count for part in range(count + 1)]
    return [x[start:end] for start, end in itertools.pairwise(bounds)]


@contextmanager
def _without_gradient_sync(model: FSDPModule) -> Iterator[None]:
    """Leave the gradients of what runs inside on their ranks; the setting would otherwise last."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _greatest_of_ranks(count: int, model: nn.Module) -> int:
    """Return the greatest ``count`` of the ranks over which FSDP2 has spread ``model``."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        # An evaluation leaves the weights of the outermost module gathered, and then none tells its mesh.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    greatest = torch.tensor(count, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    return int(greatest)
