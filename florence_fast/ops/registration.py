"""How an op is registered with torch.library, entered and differentiated: written once, used by every op.

The inputs of an op are its tensors, then plain values, and at last the backend. ``arguments`` turns them into those of
the public function, by which the reference is called and a backend chosen.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from florence_fast import ranges
from florence_fast.ops import _autotune, dispatch

Arguments = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
"""``arguments(*inputs)``, the inputs without the backend, gives ``args, kwargs`` of the public function."""


class RegisteredOp:
    """An op of torch.library, entered directly, some 7 microseconds sooner, by calls of which nobody has to know.

    These are calls in eager mode on plain tensors without gradients. Whatever traces, transforms, records or
    differentiates goes through torch's dispatcher, which tells it of the op.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        arguments: Arguments | None = None,
        entry_of: Callable[..., str] | None = None,
    ) -> None:
        """Register ``florence_fast::name``; ``entry_of(*inputs)`` names the entry in ``OPS`` if it is another one."""
        self._name, self._arguments, self._entry_of = name, arguments, entry_of
        self._function = self._prepared(function)
        self._op = torch.library.custom_op(f"florence_fast::{name}", self._function, mutates_args=())
        self._op.register_fake(lambda *inputs: fake(*self.settle(inputs)))
        self._op.register_vmap(self._mapped)
        self.register_autograd = self._op.register_autograd

    def __call__(self, *inputs: Any) -> Any:
        """Run the op; all inputs by position."""
        if (
            torch.compiler.is_dynamo_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        ):
            return self._op(*inputs)
        differentiates = torch.is_grad_enabled()
        for x in inputs:
            kind = type(x)
            if kind in _PLAIN_TENSORS:
                if x.is_meta or (differentiates and x.requires_grad) or _is_legacy_batched(x):
                    return self._op(*inputs)
            elif kind not in _VALUES:
                return self._op(*inputs)
        return self._function(*inputs)

    def settle(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the inputs with a backend in place of ``"auto"``, which programs of torch.export hold."""
        if self._arguments is None or inputs[-1] != "auto":
            return tuple(inputs)
        args, kwargs = self._arguments(*inputs[:-1])
        name = self._name if self._entry_of is None else self._entry_of(*inputs[:-1])
        return *inputs[:-1], dispatch.first_that_can(name, *args, **kwargs)

    def _mapped(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Run the op for each sample of a batch: what torch.vmap asks for, and gradients of a batch of vectors."""
        samples = [
            tuple(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True))
            for i in range(info.batch_size)
        ]
        outs = [self._op(*sample) for sample in samples]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(results) for results in zip(*outs, strict=True)), (0,) * len(outs[0])

    def _prepared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an implementation in all that holds for each: what runs in it is no longer traced.

        Its tensors are what their memory holds, the device is theirs, autocast casts nothing, whatever surrounds the
        call, the range has the op's name, and kernels are tuned where the user wants that.
        """
        label = f"op.{self._name}"

        @functools.wraps(function)
        def run(*inputs: Any) -> Any:
            if inputs[-1] == "auto":
                inputs = self.settle(inputs)
            for x in inputs:
                if isinstance(x, Tensor) and (x.is_neg() or x._is_zerotensor()):
                    inputs = tuple(_in_memory(x) if isinstance(x, Tensor) else x for x in inputs)
                    break
            x = inputs[0]
            named, without_autocast = ranges.annotate(label), dispatch.without_autocast(x.device.type)
            device = _on_device_of(x)
            if named is ranges.OFF and without_autocast is ranges.OFF and device is ranges.OFF:  # entering costs time
                return _autotune.run(function, *inputs) if _autotune.wanted(x) else function(*inputs)
            with named, without_autocast, device:
                return _autotune.run(function, *inputs) if _autotune.wanted(x) else function(*inputs)

        return run


def _in_memory(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: kernels read addresses, not what torch keeps beside them."""
    if x.is_neg():
        return x.resolve_neg()
    return torch.zeros_like(x) if x._is_zerotensor() else x


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the device of ``x`` is the current one, which is where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else ranges.OFF


_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str, list, torch.dtype})


def differentiable_gradients(
    reference: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads_out: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of ``reference(*tensors)`` in a form that can be differentiated again.

    A backward under ``create_graph=True`` needs it, for which the kernels have no rule.
    """
    device = next(x.device for x in tensors if x is not None)
    with torch.enable_grad(), dispatch.without_autocast(device.type):
        # One tensor may have been computed from another, which is no part of this op's gradient.
        own: list[Any] = [x.view_as(x) if need and x is not None else x for x, need in zip(tensors, needs, strict=True)]
        pairs = [(x, grad.to(x.dtype)) for x, grad in zip(reference(*own), grads_out, strict=True) if grad is not None]
        wanted = [x for x, need in zip(own, needs, strict=True) if need]
        outs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
