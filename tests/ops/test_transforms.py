"""What torch does to a function beside calling it, for every op alike: second derivatives, torch.func, forward-mode AD.

The reference says what is right: it is made of operations that torch has rules for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from florence_fast.ops import OPS, backend, linear
from tests.ops.test_every_op import HAS_NO_GRADIENT, example

Function = Callable[..., Tensor]

differentiable = pytest.mark.parametrize("name", [name for name in OPS if name not in HAS_NO_GRADIENT])


def function_of(name: str) -> tuple[Function, tuple[Tensor, ...]]:
    """Return the op as a smooth function from its floating-point tensors to one number, and such tensors."""
    torch.manual_seed(0)
    args, kwargs = example(name, "cpu")
    options = {key: x for key, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    options.pop("residual_scale", None)  # a constant, which gets no gradient
    places = [place for place, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        given = list(args)
        for place, x in zip(places, tensors, strict=False):
            given[place] = x
        out = OPS[name].function(*given, **kwargs | dict(zip(options, tensors[len(places) :], strict=True)))
        return sum(x.sin().sum() for x in (out if isinstance(out, tuple) else (out,)))

    return function, tuple(x.detach() for x in (*(args[place] for place in places), *options.values()))


def directions(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn_like(x) for x in tensors)


def assert_close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def hessian_product(function: Function, tensors: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    slope = sum((grad * x).sum() for grad, x in zip(grads, along, strict=True))
    return torch.autograd.grad(slope, leaves)


@differentiable
def test_a_second_derivative_is_that_of_the_reference(name: str) -> None:
    function, tensors = function_of(name)
    found = hessian_product(function, tensors, directions(tensors))
    with backend("reference"):
        wanted = hessian_product(function, tensors, directions(tensors))
    assert all(x.any() for x in wanted)
    assert_close(found, wanted)


def test_a_gradient_to_be_differentiated_is_a_partial_one() -> None:
    """One argument may have been computed from another: what reaches it by that way is not counted twice."""

    def penalty() -> Tensor:
        x = torch.linspace(-1, 1, 24).view(2, 12).requires_grad_()
        total, norm = OPS["layer_norm"].function(x.square(), torch.ones(12), residual=x)
        (grad,) = torch.autograd.grad((total * norm).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        return torch.cat([grad, second]).detach()

    found = penalty()
    with backend("reference"):
        assert_close(found, penalty())


@differentiable
def test_forward_mode_gives_the_tangent_of_the_reference(name: str) -> None:
    function, tensors = function_of(name)
    along = directions(tensors)
    with backend("reference"):
        wanted = torch.func.jvp(function, tensors, along)[1]
    assert wanted.abs() > 1e-3
    assert_close(torch.func.jvp(function, tensors, along)[1], wanted)
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, tensors, along))
        assert_close(forward_ad.unpack_dual(out).tangent, wanted)


@differentiable
def test_torch_func_differentiates_and_maps(name: str) -> None:
    function, tensors = function_of(name)
    along = directions(tensors)
    batch = tuple(torch.stack([x, x + 0.1 * y]) for x, y in zip(tensors, along, strict=True))
    everything = tuple(range(len(tensors)))
    one_by_one = []
    for sample in zip(*batch, strict=True):
        leaves = [x.clone().requires_grad_() for x in sample]
        one_by_one.append(torch.autograd.grad(function(*leaves), leaves))
    wanted = tuple(torch.stack(grads) for grads in zip(*one_by_one, strict=True))
    assert_close(torch.vmap(torch.func.grad(function, everything))(*batch), wanted)
    slopes = torch.func.jvp(torch.func.grad(function, everything), tensors, along)[1]
    assert_close(slopes, hessian_product(function, tensors, along))


@differentiable
def test_a_forced_backend_without_rules_says_what_to_do(name: str) -> None:
    function, tensors = function_of(name)
    if OPS[name].plain:
        with backend("torch"):
            assert torch.func.grad(function)(*tensors).isfinite().all()
        return
    with backend("torch"), pytest.raises(RuntimeError, match=r"ff\.backend\('reference'\), or ff\.restore"):
        torch.func.grad(function)(*tensors)


@differentiable
def test_gradients_of_a_batch_of_vectors(name: str) -> None:
    """What torch.autograd.functional.jacobian(vectorize=True) asks for: the backward, and nothing else, is mapped."""
    function, tensors = function_of(name)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    found = torch.autograd.grad(out, leaves, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)
    wanted = torch.autograd.grad(out, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert_close(x, torch.stack([y, -2 * y]))


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("kind", ["sign in the view", "no memory"])
@pytest.mark.parametrize("name_of_backend", ["auto", "torch"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_a_tensor_whose_memory_is_not_its_values(name: str, gradient: bool, name_of_backend: str, kind: str) -> None:
    torch.manual_seed(0)
    args, kwargs = OPS[name].example("cpu")
    view = torch._neg_view if kind == "sign in the view" else lambda x: torch._efficientzerotensor(x.shape)
    is_set = Tensor.is_neg if kind == "sign in the view" else Tensor._is_zerotensor

    def run(change: Callable[[Tensor], Tensor], place: int | str) -> list[Tensor]:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        given[place] = change(given[place])
        if gradient and name not in HAS_NO_GRADIENT and place != "residual_scale":
            given = {key: x.requires_grad_() if floating(x) and key == place else x for key, x in given.items()}
        positional = [given[key] for key in given if isinstance(key, int)]
        out = OPS[name].function(*positional, **{key: x for key, x in given.items() if isinstance(key, str)})
        outs = list(out) if isinstance(out, tuple) else [out]
        x = given[place]
        if x.requires_grad and any(y.requires_grad for y in outs):
            outs.append(torch.autograd.grad(sum(y.sin().sum() for y in outs if y.requires_grad), x)[0])
        return [y.detach() for y in outs]

    with backend(name_of_backend):
        for place, x in {**dict(enumerate(args)), **kwargs}.items():
            if not floating(x):
                continue
            assert is_set(view(x.detach()))
            found = run(lambda x: view(x.detach()), place)
            wanted = run(lambda x: (-x if kind == "sign in the view" else torch.zeros_like(x)).detach(), place)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name_of_backend", ["auto", "torch", "reference"])
def test_linear_is_transformed_as_the_librarys(name_of_backend: str) -> None:
    torch.manual_seed(0)
    tensors = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    along = directions(tensors)

    def function(*tensors: Tensor) -> Tensor:
        return linear(*tensors).sin().sum()

    def library(*tensors: Tensor) -> Tensor:
        return torch.nn.functional.linear(*tensors).sin().sum()

    with backend(name_of_backend):
        assert_close(torch.func.jvp(function, tensors, along), torch.func.jvp(library, tensors, along))
        assert_close(hessian_product(function, tensors, along), hessian_product(library, tensors, along))
        found, wanted = (torch.vmap(torch.func.grad(f), (0, None, None))(*tensors) for f in (function, library))
        assert_close(found, wanted)
        negated = torch._neg_view(tensors[0])
        assert_close(linear(negated, *tensors[1:]), torch.nn.functional.linear(-tensors[0], *tensors[1:]))


@pytest.mark.parametrize("name", OPS)
def test_the_default_device_changes_nothing(name: str) -> None:
    args, kwargs = OPS[name].example("cpu")
    wanted = OPS[name].function(*args, **kwargs)
    with torch.device("meta"):
        found = OPS[name].function(*args, **kwargs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
