"""One op, written down once: what it computes, which backends can run it, how torch knows of it.

An op is a folder. ``op.py`` holds the public function, its checks, its reference and its ``Op``; ``torch.py``,
``cpp.py`` and ``triton.py`` are the backends, imported when they are first used; ``cases.py`` holds the sizes that
verification, benchmarks and tests take. The definition is not in ``__init__.py``: importing the module ``torch`` of a
package replaces what ``import torch`` had bound there.

The backends of ``name`` have the same two functions, with the same order of arguments:

    name_fwd(*tensors, *values) -> out or (out, *kept)
    name_bwd(grad_out, *tensors, *kept, needs, *values) -> one gradient or None for each of the tensors

``kept`` is for the backward alone. A last value called ``train`` says whether there will be one; the backward does not
get it, nor ``needs`` where there is one tensor. From the annotations of the ``torch`` backend's ``name_fwd`` follow the
schemas of both ops of torch.library.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from florence_fast.ops import dispatch
from florence_fast.ops.cases import Subject
from florence_fast.ops.registration import Arguments, RegisteredOp, differentiable_gradients

Reasons = Callable[..., list[str]]
"""Called with the arguments of the public function; gives the reasons why a backend cannot run them."""


class Op:
    """An op: an entry of ``OPS``, and where it has tensors of its own a pair of ops of torch.library.

    Args:
        function: the public function; its name is the op's.
        reference: its definition in plain PyTorch, with the same arguments.
        example: ``example(device)`` gives small ``args, kwargs`` that ``function`` accepts.
        reasons: backend -> why it cannot run some arguments. A backend without reasons runs everything; one whose file
            is missing runs nothing.
        plain: every backend is made of PyTorch's own operations, which it transforms, differentiates and exports.
        tensors: how many leading inputs are tensors or None, each with a gradient unless ``name_bwd`` returns fewer;
            0 if nothing is registered.
        outputs: the fake forward, ``outputs(*tensors, *values, backend)``: empty tensors with the shapes and dtypes of
            what ``name_fwd`` gives.
        forward: ``forward(*tensors, *values, backend)``, annotated, where it is more than to call ``name_fwd``.
        backward: ``backward(grad_out, *tensors, *kept, needs, *values, backend)`` where it is more than to call
            ``name_bwd``.
        arguments: turns ``(*tensors, *values)`` into those of ``function``; by default they go by their names.
        definition: ``(*tensors, *values) -> out``, what second derivatives are of; by default ``reference``.
        flops: ``flops(*shapes)``, the FLOPs of the forward's products; the backward has twice as many.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        reference: Callable[..., Any],
        *,
        example: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]],
        reasons: dict[str, Reasons] | None = None,
        plain: bool = False,
        tensors: int = 0,
        outputs: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
        forward: Callable[..., Any] | None = None,
        backward: Callable[..., Any] | None = None,
        arguments: Arguments | None = None,
        definition: Callable[..., Tensor] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.function, self.reference, self.plain = function.__name__, function, reference, plain
        self._make_example, self._reasons = example, reasons or {}
        self._package = function.__module__.rpartition(".")[0]
        self._backends: dict[str, ModuleType] = {}
        self.forward_op: Any = None  # a RegisteredOp, of ops that have kernels of their own
        self.backward_op: Any = None
        assert self.name not in dispatch.OPS, f"the op {self.name!r} is registered twice"
        dispatch.OPS[self.name] = self
        if tensors:
            assert outputs is not None, f"{self.name} needs a fake forward"
            self._register(tensors, outputs, forward, backward, arguments, definition)
        if flops is not None:
            of_torch = torch.ops.florence_fast
            register_flop_formula(getattr(of_torch, self.name))(flops)
            register_flop_formula(getattr(of_torch, f"{self.name}_backward"))(
                lambda grad_out, *args, **kwargs: 2 * flops(*args, **kwargs)
            )

    def example(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make small ``args, kwargs`` that ``function`` accepts; the state of the random numbers stays as it was."""
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
            return self._make_example(device)

    def unsupported_reasons(self, backend: str, *args: Any, **kwargs: Any) -> list[str]:
        """Say why ``backend`` cannot run the op on these arguments of ``function``; empty if it can."""
        find = self._reasons.get(backend)
        if find is not None:
            return find(*args, **kwargs)
        if backend in ("torch", "reference"):
            return []
        return [f"no {'Triton' if backend == 'triton' else 'native'} kernel for {self.name} in this version"]

    def backend(self, name: str) -> ModuleType:
        """Return the module of a backend; that of the kernels needs triton, so each is imported where it is used."""
        module = self._backends.get(name)
        if module is None:
            module = self._backends[name] = importlib.import_module(f"{self._package}.{name}")
        return module

    def subject(self) -> Subject | None:
        """Return the op's cases, from ``cases.py``; None where no error of numbers says whether a result is right."""
        return getattr(importlib.import_module(f"{self._package}.cases"), "SUBJECTS", {}).get(self.name)

    def __call__(self, *inputs: Any) -> Any:
        """Run the registered op on ``(*tensors, *values, backend)``, without ``train``; the result and what is kept.

        An op that keeps nothing returns a tensor alone, not a tuple of one, which would make compiled sizes constants.
        """
        if self._trains:
            wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[: self._tensors])
            inputs = (*inputs[:-1], wants, inputs[-1])
        return self.forward_op(*inputs)

    def _register(
        self,
        tensors: int,
        outputs: Callable[..., Tensor | tuple[Tensor, ...]],
        forward: Callable[..., Any] | None,
        backward: Callable[..., Any] | None,
        arguments: Arguments | None,
        definition: Callable[..., Tensor] | None,
    ) -> None:
        of_torch = getattr(self.backend("torch"), f"{self.name}_fwd") if forward is None else forward
        inputs, result = _schema_of(of_torch)
        num_kept = 0 if result is Tensor else len(get_args(result)) - 1
        self._tensors, self._trains = tensors, "train" in inputs
        arguments = arguments or _by_name(list(inputs), self.function)
        values = list(inputs.values())[tensors:]
        kept = [inspect.Parameter(f"kept{i}", _POSITIONAL, annotation=Tensor) for i in range(num_kept)]
        grad_out = inspect.Parameter("grad_out", _POSITIONAL, annotation=Tensor)
        # The backward of one tensor runs only if that needs a gradient.
        needs = [inspect.Parameter("needs", _POSITIONAL, annotation=list[bool])] if tensors > 1 else []
        of_tensors = list(inputs.values())[:tensors]
        name_fwd = f"{self.name}_fwd"

        def run_forward(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
            *given, name = inputs
            return getattr(self._backends.get(name) or self.backend(name), name_fwd)(*given)

        def run_backward(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
            others, backend = inputs[: -2 if self._trains else -1], inputs[-1]
            if backward is not None:
                grads = backward(*others, backend)
            else:
                grads = getattr(self.backend(backend), f"{self.name}_bwd")(*others)
            return _filled(grads, inputs[1 : 1 + tensors])

        def fake_backward(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
            own, wanted = inputs[1 : 1 + tensors], inputs[1 + tensors + num_kept] if needs else [True]
            return _filled([x.new_empty(x.shape) if n else None for x, n in zip(own, wanted, strict=True)], own)

        if forward is None:
            _annotate(run_forward, [*inputs.values(), _BACKEND], result)
        gradients = Tensor if tensors == 1 else tuple[(Tensor,) * tensors]
        _annotate(run_backward, [grad_out, *of_tensors, *kept, *needs, *values, _BACKEND], gradients)
        self.forward_op = RegisteredOp(self.name, forward or run_forward, outputs, arguments)
        self.backward_op = RegisteredOp(f"{self.name}_backward", run_backward, fake_backward)
        self._join(tensors, arguments, definition)

    def _join(self, tensors: int, arguments: Arguments, definition: Callable[..., Tensor] | None) -> None:
        """Tell torch's autograd that the second op is the backward of the first."""
        forward_op, backward_op = self.forward_op, self.backward_op

        def define_out(*inputs: Any) -> Tensor:
            args, kwargs = arguments(*inputs)
            return self.reference(*args, **kwargs)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            # What is kept gets no gradient, and must not cost one made of zeros.
            kept = () if isinstance(output, Tensor) else output[1:]
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors], *kept)
            ctx.values = forward_op.settle(inputs)[tensors:]

        def run_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            no_gradients = (None,) * len(ctx.values)
            if grad_out is None:
                return (None,) * tensors + no_gradients
            # Read once: activation checkpointing allows no more.
            needs, saved = list(ctx.needs_input_grad[:tensors]), ctx.saved_tensors
            if torch.is_grad_enabled():
                define_it = functools.partial(_with_values, definition or define_out, ctx.values[:-1])
                return *differentiable_gradients(define_it, saved[:tensors], needs, [grad_out]), *no_gradients
            # .sum() and opcheck send expanded gradients: the backward sees memory that it can walk through.
            grads = backward_op(grad_out.contiguous(), *saved, *([needs] if tensors > 1 else ()), *ctx.values)
            grads = (grads,) if isinstance(grads, Tensor) else grads
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *no_gradients

        forward_op.register_autograd(run_backward, setup_context=setup_context)


_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_BACKEND = inspect.Parameter("backend", _POSITIONAL, annotation=str)


def _schema_of(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], Any]:
    """Return the annotated inputs of a forward without the backend, and the type of what it returns."""
    signature = inspect.signature(function, eval_str=True)
    inputs = {name: x for name, x in signature.parameters.items() if name != "backend"}
    return inputs, signature.return_annotation


def _annotate(function: Callable[..., Any], parameters: list[inspect.Parameter], result: Any) -> None:
    """Give a function the signature from which torch.library reads its schema."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]


def _by_name(names: list[str], function: Callable[..., Any]) -> Arguments:
    """Return what gives ``function`` those of the inputs that it has a parameter for."""
    accepted = set(inspect.signature(function).parameters)

    def arguments(first: Any, *others: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pairs = zip(names[1:], others, strict=False)  # ``train`` may be missing
        return (first,), {name: value for name, value in pairs if name in accepted}

    return arguments


def _filled(grads: Sequence[Tensor | None] | Tensor, tensors: Sequence[Tensor | None]) -> Any:
    """Put an empty tensor where there is no gradient: one for each of the tensors, or the only one alone."""
    if isinstance(grads, Tensor):
        return grads
    x: Any = tensors[0]
    filled = [x.new_empty(0) if grad is None else grad for grad in grads]
    filled += [x.new_empty(0) for _ in range(len(tensors) - len(filled))]
    return filled[0] if len(filled) == 1 else tuple(filled)


def _with_values(function: Callable[..., Tensor], values: Sequence[Any], *tensors: Tensor | None) -> list[Tensor]:
    return [function(*tensors, *values)]
