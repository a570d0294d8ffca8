"""How an op is registered with torch.library, entered and differentiated: written once, used by every op.

The inputs of an op are its tensors, then plain values, and at last the backend. ``arguments`` turns them into those of
the public function, by which the reference is called and a backend chosen.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from florence_fast import ranges
from florence_fast.ops import _autotune, _backend

Arguments = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
"""``arguments(*inputs)``, the inputs without the backend, gives ``args, kwargs`` of the public function."""


class Op:
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
        return self._op(*inputs) if _concerns_torch(inputs) else self._function(*inputs)

    def settle(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the inputs with a backend in place of ``"auto"``, which programs of torch.export hold."""
        if self._arguments is None or inputs[-1] != "auto":
            return tuple(inputs)
        args, kwargs = self._arguments(*inputs[:-1])
        name = self._name if self._entry_of is None else self._entry_of(*inputs[:-1])
        return *inputs[:-1], _backend.first_that_can(name, *args, **kwargs)

    def _mapped(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Run the op for each sample of a batch: what torch.vmap asks for, and gradients of a batch of vectors."""
        samples = [
            tuple(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True))
            for i in range(info.batch_size)
        ]
        outs = [self._op(*sample) for sample in samples]
        return tuple(torch.stack(results) for results in zip(*outs, strict=True)), (0,) * len(outs[0])

    def _prepared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an implementation in all that holds for each: what runs in it is no longer traced.

        Its tensors are what their memory holds, the device is theirs, autocast casts nothing, whatever surrounds the
        call, the range has the op's name, and kernels are tuned where the user wants that.
        """
        label = f"op.{self._name}"

        @functools.wraps(function)
        def run(*inputs: Any) -> Any:
            inputs = tuple(_in_memory(x) if isinstance(x, Tensor) else x for x in self.settle(inputs))
            x = inputs[0]
            with ranges.annotate(label), _backend.without_autocast(x.device.type), _on_device_of(x):
                return _autotune.run(function, *inputs) if _autotune.wanted(x) else function(*inputs)

        return run


def _in_memory(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: kernels read addresses, not what torch keeps beside them."""
    if x.is_neg():
        return x.resolve_neg()
    return torch.zeros_like(x) if x._is_zerotensor() else x


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the device of ``x`` is the current one, which is where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else nullcontext()


def _concerns_torch(inputs: tuple[Any, ...]) -> bool:
    """Say whether a call has to go through torch's dispatcher."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    differentiates = torch.is_grad_enabled()
    for x in inputs:
        kind = type(x)
        if kind in _PLAIN_TENSORS:
            if x.is_meta or (differentiates and x.requires_grad) or torch._C._functorch.is_legacy_batchedtensor(x):
                return True
        elif kind not in _VALUES:
            return True
    return False


_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str, list, torch.dtype})


def define_pair(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    backward_fake: Callable[..., tuple[Tensor, ...]],
    arguments: Arguments,
) -> tuple[Op, Op]:
    """Register ``florence_fast::name`` and ``florence_fast::name_backward``; whoever calls it joins them.

    The backward is given a backend that is settled.
    """
    return Op(name, forward, forward_fake, arguments), Op(f"{name}_backward", backward, backward_fake)


def define(
    name: str,
    num_tensors: int,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    backward_fake: Callable[..., tuple[Tensor, ...]],
    arguments: Arguments,
    reference: Callable[..., Tensor] | None = None,
) -> Op:
    """Register ``florence_fast::name`` and ``florence_fast::name_backward`` with torch.library and join them.

    Args:
        name: the op's name.
        num_tensors: how many leading inputs are tensors or None; the others are plain values.
        forward: ``(*tensors, *values) -> (out, *kept)``; ``kept`` is for the backward alone. Annotated, because
            torch.library reads its schema from it.
        forward_fake: the same with shapes only.
        backward: ``(grad_out, *tensors, *kept, needs: list[bool], *values)`` -> one gradient for each of
            ``tensors``, an empty tensor where ``needs`` is false; ``grad_out`` is contiguous.
        backward_fake: the same with shapes only.
        arguments: turns ``(*tensors, *values)`` into the arguments of the public function.
        reference: ``(*tensors, *values) -> out``; by default that of the public function.
    """
    forward_op, backward_op = define_pair(name, forward, forward_fake, backward, backward_fake, arguments)

    def define_out(*inputs: Any) -> Tensor:
        args, kwargs = arguments(*inputs)
        return _backend.OPS[name].reference(*args, **kwargs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # What is kept gets no gradient, and must not cost one made of zeros.
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:num_tensors], *output[1:])
        ctx.values = forward_op.settle(inputs)[num_tensors:]

    def run_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        no_gradients = (None,) * len(ctx.values)
        if grad_out is None:
            return (None,) * num_tensors + no_gradients
        # Read once: activation checkpointing allows no more.
        needs, saved = list(ctx.needs_input_grad[:num_tensors]), ctx.saved_tensors
        if torch.is_grad_enabled():
            define_it = functools.partial(_with_values, reference or define_out, ctx.values[:-1])
            return *differentiable_gradients(define_it, saved[:num_tensors], needs, [grad_out]), *no_gradients
        # .sum() and opcheck send expanded gradients: the backward sees memory that it can walk through.
        grads = backward_op(grad_out.contiguous(), *saved, needs, *ctx.values)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *no_gradients

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    return forward_op


def _with_values(function: Callable[..., Tensor], values: Sequence[Any], *tensors: Tensor | None) -> list[Tensor]:
    return [function(*tensors, *values)]


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
    with torch.enable_grad(), _backend.without_autocast(device.type):
        # One tensor may have been computed from another, which is no part of this op's gradient.
        own = [x.view_as(x) if need else x for x, need in zip(tensors, needs, strict=True)]
        pairs = [(x, grad.to(x.dtype)) for x, grad in zip(reference(*own), grads_out, strict=True) if grad is not None]
        wanted = [x for x, need in zip(own, needs, strict=True) if need]
        outs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
