"""What every op promises on every backend, over the small cases of ``ops/<op>/cases.py``.

A new op is here by being in ``OPS``. Tests of an op of its own hold what no other op has.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from florence_fast import ops, verify
from florence_fast.ops.cases import Case, Inputs, Subject, each
from florence_fast.verify.compare import Judgement, judge, results

BACKENDS = ("torch", "cpp", "triton")
SUBJECTS = {name: subject for name, op in ops.OPS.items() if (subject := op.subject()) is not None}
"""All ops but those that return indices, which are right or wrong: their tests compare box by box."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

every_op = pytest.mark.parametrize("name", SUBJECTS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize(
    ("name", "case", "backend"),
    [
        pytest.param(name, case, backend, id=f"{name}-{case.name}-{backend}")
        for name, subject in SUBJECTS.items()
        for number, case in enumerate(subject.small)
        for backend in BACKENDS
        if number == 0 or backend != "triton"  # the interpreter takes its time, and each op's own tests go on
    ],
)


def function_of(name: str, inputs: Inputs) -> Callable[..., Any]:
    return functools.partial(ops.OPS[name].function, **inputs.options)


def run(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """Return every result and gradient by name."""
    return results(function_of(name, inputs), inputs.tensors, inputs.grad_out)


@contextlib.contextmanager
def forced(name: str, backend: str, inputs: Inputs) -> Iterator[None]:
    """Force a backend; where it cannot run the inputs the test is left out, with the reason."""
    reasons = ops.OPS[name].unsupported_reasons(backend, **inputs.tensors, **inputs.options)
    if reasons:
        pytest.skip("; ".join(reasons))
    with ops.backend(backend):
        yield


def first_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    return SUBJECTS[name].small[0].make(dtype, "cpu", seed)


def assert_right(judgements: list[Judgement]) -> None:
    for judgement in judgements:
        assert judgement.passed, judgement


def test_every_op_has_small_cases() -> None:
    assert set(ops.OPS) - set(SUBJECTS) == {"nms", "batched_nms"}
    assert all(isinstance(op, Subject) and op.small for op in SUBJECTS.values())


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_are_the_references(
    name: str, case: Case, backend: str, dtype: str, poisoned_memory: None
) -> None:
    inputs = case.make(DTYPES[dtype], "cpu", 0)
    with forced(name, backend, inputs):
        found = run(name, inputs)
    plain = results(functools.partial(ops.OPS[name].reference, **inputs.options), inputs.tensors, inputs.grad_out)
    exact = verify.exact_results(name, inputs)
    for key, x in plain.items():
        assert found[key].dtype == x.dtype and found[key].shape == x.shape, key
        if dtype == "float64":
            torch.testing.assert_close(found[key], exact[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    if dtype == "float32":
        # Sums of few numbers in another order: four roundings are always allowed.
        assert_right(
            [Judgement(j.name, j.error, j.plain_error, max(j.limit, 5e-7)) for j in judge(found, plain, exact)]
        )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@every_op
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_as_exact_as_plain_pytorch(name: str, backend: str, dtype: str, poisoned_memory: None) -> None:
    draws = []
    for seed in range(3):
        inputs = SUBJECTS[name].checked[0].make(DTYPES[dtype], "cpu", seed)
        with forced(name, backend, inputs):
            draws.append(verify.draw(SUBJECTS[name], inputs))
    assert_right(verify.joined(draws))


@every_case
def test_every_gradient_alone_and_all_but_one_are_those_of_all(name: str, case: Case, backend: str) -> None:
    inputs = case.make(torch.float32, "cpu", 0)
    with forced(name, backend, inputs):
        everything = run(name, inputs)
        names = set(inputs.tensors)
        for wanted in [*({one} for one in names), *(names - {one} for one in names if len(names) > 1)]:
            leaves = {key: x.detach().requires_grad_(key in wanted) for key, x in inputs.tensors.items()}
            outs = each(function_of(name, inputs)(**leaves))
            grads = torch.autograd.grad(outs, [leaves[key] for key in sorted(wanted)], each(inputs.grad_out))
            for key, grad in zip(sorted(wanted), grads, strict=True):
                assert torch.equal(grad, everything[f"d{key}"]), f"{key} of {wanted}"


@every_backend
@every_op
def test_without_gradients_the_result_is_that_of_training(name: str, backend: str) -> None:
    inputs = first_case(name)
    with forced(name, backend, inputs):
        trained = run(name, inputs)
        with torch.no_grad():
            outs = each(function_of(name, inputs)(**inputs.tensors))
    keys = ["out"] if len(outs) == 1 else [f"out{i}" for i in range(len(outs))]
    for key, out in zip(keys, outs, strict=True):
        torch.testing.assert_close(out, trained[key])


class Calls(list[tuple[str, tuple[Any, ...]]]):
    """The calls of an op's two registered ops: the name and the inputs of each."""

    def watch(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for op, title in ((ops.OPS[name].forward_op, name), (ops.OPS[name].backward_op, f"{name}_backward")):
            if op is not None:
                for way in ("_op", "_function"):
                    monkeypatch.setattr(op, way, self._noting(title, getattr(op, way)))

    def _noting(self, title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            self.append((title, inputs))
            return function(*inputs)

        return call


@every_case
def test_opcheck(name: str, case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both registered ops, as the public function and autograd call them: all gradients, one, and none."""
    if ops.OPS[name].forward_op is None:
        pytest.skip("made of PyTorch's own operations")
    if backend == "triton":
        pytest.skip("the interpreter takes too long; each op's own tests check its kernels so")
    inputs, calls = case.make(torch.float32, "cpu", 0), Calls()
    with forced(name, backend, inputs), monkeypatch.context() as patch:
        calls.watch(name, patch)
        run(name, inputs)
        first = next(iter(inputs.tensors))
        some = {key: x.detach().requires_grad_(key == first) for key, x in inputs.tensors.items()}
        torch.autograd.backward(each(function_of(name, inputs)(**some)), each(inputs.grad_out))
        with torch.no_grad():
            function_of(name, inputs)(**inputs.tensors)
    assert [title for title, _ in calls] == [name, f"{name}_backward"] * 2 + [name]
    for title, arguments in calls:
        leaves = title == name  # the backward has no gradient of its own
        arguments = [
            x.detach().requires_grad_(leaves and x.requires_grad) if isinstance(x, Tensor) else x for x in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.florence_fast, title).default, tuple(arguments))


@every_backend
@every_op
def test_compiles_in_one_graph(name: str, backend: str) -> None:
    inputs = first_case(name)
    with forced(name, backend, inputs):
        expected = run(name, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(function_of(name, inputs), fullgraph=True, backend="aot_eager")
        found = results(compiled, inputs.tensors, inputs.grad_out)
    for key, x in expected.items():
        assert torch.equal(found[key], x), key


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@every_op
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(name: str, backend: str, poisoned_memory: None) -> None:
    case = SUBJECTS[name].empty
    if case is None:
        pytest.skip("refuses an empty batch, by name")
    inputs = case.make(torch.float32, "cpu", 0)
    with forced(name, backend, inputs):
        found = run(name, inputs)
        with torch.no_grad():
            outs = each(function_of(name, inputs)(**inputs.tensors))
    assert [out.shape for out in outs] == [grad.shape for grad in each(inputs.grad_out)]
    assert all(found[f"d{key}"].shape == x.shape and not found[f"d{key}"].any() for key, x in inputs.tensors.items())


def turned(x: Tensor) -> Tensor:
    """The same values at other strides, at an odd address."""
    memory = x.new_empty(x.numel() + 1)[1:].view(x.shape[::-1] if x.ndim > 1 else x.shape)
    view = memory.permute(*reversed(range(x.ndim))) if x.ndim > 1 else memory
    return view.copy_(x)


@every_backend
@every_op
def test_any_strides_and_the_inputs_are_left_alone(name: str, backend: str) -> None:
    inputs = first_case(name)
    before = {key: x.clone() for key, x in inputs.tensors.items()}
    other = Inputs({key: turned(x) for key, x in inputs.tensors.items()}, inputs.options, inputs.grad_out)
    other.grad_out = tuple(map(turned, each(inputs.grad_out)))
    with forced(name, backend, inputs):
        expected, found = run(name, inputs), run(name, other)
        outs = each(function_of(name, inputs)(**other.tensors))
    assert all(out.is_contiguous() for out in outs)
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=2e-5, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert all(torch.equal(x, before[key]) for key, x in inputs.tensors.items())


@every_op
def test_shapes_on_the_meta_device(name: str) -> None:
    inputs = first_case(name)
    with ops.backend("torch"):
        here = run(name, inputs)
        moved = {key: x.to("meta") for key, x in inputs.tensors.items()}
        options = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in inputs.options.items()}
        grads_out = tuple(x.to("meta") for x in each(inputs.grad_out))
        there = run(name, Inputs(moved, options, grads_out))
    assert {key: (x.shape, x.dtype) for key, x in there.items()} == {k: (x.shape, x.dtype) for k, x in here.items()}


@every_op
def test_activation_checkpointing(name: str) -> None:
    inputs = first_case(name)
    keys = list(inputs.tensors)

    def by_position(*tensors: Tensor) -> Any:
        return function_of(name, inputs)(**dict(zip(keys, tensors, strict=True)))

    leaves = [x.detach().requires_grad_() for x in inputs.tensors.values()]
    outs = each(checkpoint(by_position, *leaves, use_reentrant=False))
    found = torch.autograd.grad(outs, leaves, each(inputs.grad_out))
    expected = run(name, inputs)
    assert all(torch.equal(grad, expected[f"d{key}"]) for key, grad in zip(keys, found, strict=True))


@every_op
def test_second_derivatives_are_those_of_the_reference(name: str) -> None:
    inputs = first_case(name, torch.float64)

    def second_derivatives() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs.tensors.values()]
        outs = each(function_of(name, inputs)(**dict(zip(inputs.tensors, leaves, strict=True))))
        total = sum((out.square() * (1 + grad)).sum() for out, grad in zip(outs, each(inputs.grad_out), strict=True))
        (grad,) = torch.autograd.grad(total, leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    with ops.backend("torch"):
        found = second_derivatives()
    with ops.backend("reference"):
        expected = second_derivatives()
    assert any(x.any() for x in expected)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every_backend
@every_op
def test_autocast_is_a_cast_of_what_it_casts(name: str, backend: str) -> None:
    inputs, casts = first_case(name), SUBJECTS[name].autocast
    low = {key: x.bfloat16() if key in casts else x for key, x in inputs.tensors.items()}
    if name == "conv_embed":
        pytest.skip("the library's parts are cast one by one")
    with forced(name, backend, Inputs(low, inputs.options, inputs.grad_out)):
        outs = each(function_of(name, inputs)(**{key: x.detach().requires_grad_() for key, x in low.items()}))
        with torch.autocast("cpu", torch.bfloat16):
            leaves = {key: x.detach().requires_grad_() for key, x in inputs.tensors.items()}
            found = each(function_of(name, inputs)(**leaves))
        grads = torch.autograd.grad(
            found, list(leaves.values()), [g.to(o.dtype) for g, o in zip(each(inputs.grad_out), found, strict=True)]
        )
    assert [x.dtype for x in found] == [torch.bfloat16 if casts else torch.float32] * len(found)
    assert all(map(torch.equal, found, outs))
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@every_op
def test_autocast_leaves_float64_alone(name: str) -> None:
    inputs = first_case(name, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = each(function_of(name, inputs)(**inputs.tensors))
    assert all(map(torch.equal, found, each(function_of(name, inputs)(**inputs.tensors))))


@every_op
def test_auto_never_interprets(name: str) -> None:
    inputs = first_case(name)
    assert ops.dispatch.choose(name, **inputs.tensors, **inputs.options) != "triton"


@every_op
def test_a_first_tensor_of_another_kind_is_named(name: str) -> None:
    inputs = first_case(name)
    first = next(iter(inputs.tensors))
    for wrong, got in (([1.0], "list"), (inputs.tensors[first].long(), "torch.int64")):
        with pytest.raises(TypeError, match=f"^{first} must be a .*tensor, got {got}$"):
            function_of(name, inputs)(**inputs.tensors | {first: wrong})
