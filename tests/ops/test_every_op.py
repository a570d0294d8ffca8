"""What holds for every op alike, whatever it computes: the table of ops is walked through."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence_fast.ops import OPS, backend

ops = pytest.mark.parametrize("name", OPS)
HAS_NO_GRADIENT = {"nms", "batched_nms"}
"""They return indices, as many as the values of the boxes say: nothing to differentiate, and no graph to capture."""


def example(name: str, device: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of the op's own example; what has a gradient asks for it."""
    args, kwargs = OPS[name].example(device)
    wants = name not in HAS_NO_GRADIENT
    return [x.detach().requires_grad_() if wants and _is_float(x) else x for x in args], kwargs


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def outputs_and_gradients(name: str, args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Run the op forward and, if it has one, backward."""
    out = OPS[name].function(*args, **kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    if name in HAS_NO_GRADIENT:
        return outs
    leaves = [x for x in args if _is_float(x)]
    return [*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), leaves)]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@ops
@pytest.mark.parametrize("name_of_backend", ["torch", "cpp", "triton"])
def test_deterministic_algorithms_are_honoured(
    name: str, name_of_backend: str, device: str, deterministic: None
) -> None:
    args, kwargs = example(name, device)
    reasons = OPS[name].unsupported_reasons(name_of_backend, *args, **kwargs)
    if reasons:
        pytest.skip("; ".join(reasons))
    with backend(name_of_backend):
        first, second = (outputs_and_gradients(name, args, kwargs) for _ in range(2))
    assert first, "nothing was computed"
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


class Call(nn.Module):
    """The op as a module, which is what torch.export takes."""

    def __init__(self, name: str, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.kwargs = name, kwargs

    def forward(self, *args: Any) -> Any:
        return OPS[self.name].function(*args, **self.kwargs)


@ops
def test_is_exported_and_runs_without_us_as_it_does_here(name: str, device: str) -> None:
    args, kwargs = OPS[name].example(device)
    program = torch.export.export(Call(name, kwargs), tuple(args)).module()
    torch.testing.assert_close(program(*args), OPS[name].function(*args, **kwargs), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPS if name not in HAS_NO_GRADIENT])
def test_forward_and_backward_are_captured_in_a_cuda_graph(name: str) -> None:
    args, kwargs = example(name, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles or allocates for the first time cannot be captured
        for _ in range(3):
            outputs_and_gradients(name, args, kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(name, args, kwargs)
    with torch.no_grad():  # other values in the same memory: a replay must compute, not remember
        fresh, _ = example(name, "cuda")
        for old, new in zip(args, fresh, strict=True):
            if _is_float(old):
                old.copy_(new)
    graph.replay()
    wanted = outputs_and_gradients(name, args, kwargs)
    for x, y in zip(captured, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
