"""How a backend is chosen and forced, and what is said where it cannot run."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from florence_fast import native, ops
from florence_fast.ops import dispatch, registration

NOT_HERE = "kernels run on the CPU only under TRITON_INTERPRET=1"
NOT_BUILT = "the native extension was not built"
AUTO = "cpp" if native.extension() else "torch"


def call() -> torch.Tensor:
    (args, kwargs) = ops.OPS["window_attention"].example("cpu")
    return ops.window_attention(*args, **kwargs)


def chosen() -> str:
    (args, kwargs) = ops.OPS["window_attention"].example("cpu")
    return dispatch.choose("window_attention", *args, **kwargs)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLORENCE_FAST_BACKEND", raising=False)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == AUTO
    monkeypatch.setattr(native, "extension", lambda: None)
    assert chosen() == "torch"


def test_context_wins_over_variable_and_nests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "reference")
    assert chosen() == "reference"
    with ops.backend("torch"):
        assert chosen() == "torch"
        with pytest.raises(KeyError), ops.backend("reference"):
            assert chosen() == "reference"
            raise KeyError
        assert chosen() == "torch"
    with ops.backend("auto"):
        assert chosen() == AUTO
    assert chosen() == "reference"


@pytest.mark.parametrize(("name", "reason"), [("triton", NOT_HERE), ("cpp", NOT_BUILT)])
def test_forced_backend_that_cannot_run_says_why(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(native, "extension", lambda: None)
    with (
        ops.backend(name),
        pytest.raises(RuntimeError, match=f"backend '{name}' cannot run window_attention: {reason}"),
    ):
        call()


def test_the_interpreter_runs_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == AUTO
    with ops.backend("triton"):
        assert chosen() == "triton"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        call()


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.OPS["window_attention"], "unsupported_reasons", lambda *_, **__: ["a", "b"])
    with ops.backend("torch"), pytest.raises(RuntimeError, match=r"cannot run window_attention: a; b$"):
        call()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'tritn' \(did you mean 'triton'\?\)"), ops.backend("tritn"):
        call()
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "pytorch")
    with pytest.raises(ValueError, match="unknown FLORENCE_FAST_BACKEND 'pytorch'"):
        call()
    assert not dispatch._forced


def test_each_thread_has_a_backend_of_its_own() -> None:
    """They enter and leave in an order that would mix up one stack for all."""
    turns = {name: threading.Barrier(2, timeout=10) for name in ("both in", "first out")}
    seen: dict[str, list[str]] = {"torch": [], "reference": []}

    def work(name: str, other_leaves_first: bool) -> None:
        with ops.backend(name):
            turns["both in"].wait()
            seen[name].append(chosen())
            if other_leaves_first:
                turns["first out"].wait()
                seen[name].append(chosen())
        seen[name].append(chosen())
        if not other_leaves_first:
            turns["first out"].wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, "torch", False), pool.submit(work, "reference", True)]:
            done.result()
    assert seen == {"torch": ["torch", AUTO], "reference": ["reference", "reference", AUTO]}
    assert chosen() == AUTO


def test_a_thread_without_a_setting_follows_the_main_thread() -> None:
    def inside() -> str:
        with ops.backend("reference"):
            return chosen()

    with ThreadPoolExecutor(1) as pool, ops.backend("torch"):
        assert pool.submit(chosen).result() == "torch"
        assert pool.submit(inside).result() == "reference"
        assert pool.submit(chosen).result() == "torch"
    assert chosen() == AUTO


def test_a_compiled_function_follows_the_backend_of_the_thread_that_calls_it() -> None:
    torch.compiler.reset()
    (args, kwargs) = ops.OPS["l2_normalize"].example("cpu")
    which = torch.compile(lambda x: x + dispatch.BACKENDS.index(dispatch.choose("l2_normalize", *args, **kwargs)),
                          fullgraph=True, backend="eager")  # fmt: skip

    def called(name: str) -> str:
        with ops.backend(name):
            return dispatch.BACKENDS[int(which(torch.zeros(())))]

    with ThreadPoolExecutor(1) as pool:
        assert [called("reference"), called("torch"), called("auto")] == ["reference", "torch", AUTO]
        with ops.backend("reference"):
            assert pool.submit(called, "torch").result() == "torch"
            assert called("torch") == "torch"
            assert dispatch.BACKENDS[int(which(torch.zeros(())))] == "reference"


PRECISIONS = [("highest", False), ("high", True), ("medium", True)]


@pytest.fixture
def same_precision_afterwards() -> Iterator[None]:
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="new in torch 2.9")
def test_tf32_by_either_setting_of_torch(same_precision_afterwards: None) -> None:
    x, matmul = torch.zeros(2), torch.backends.cuda.matmul
    for word, allowed in PRECISIONS:
        torch.set_float32_matmul_precision(word)
        assert dispatch.allows_tf32(x) is allowed
    for word, allowed in (("ieee", False), ("tf32", True), ("none", False)):
        matmul.fp32_precision = word
        assert dispatch.allows_tf32(x) is allowed
        assert not dispatch.allows_tf32(x.half())
    torch.backends.fp32_precision = "tf32"
    assert dispatch.allows_tf32(x)


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched on the device in force, which need not be that of the tensors, reads memory of another one."""
    entered: list[Any] = []

    class Device:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    class OnGPU:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with registration._on_device_of(OnGPU()):
        entered.append("launched")
    assert entered == [torch.device("cuda", 1), "launched", "left"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with registration._on_device_of(OnGPU()), registration._on_device_of(torch.zeros(1)):
        assert len(entered) == 3


@pytest.mark.parametrize("name", ["l2_normalize", "nms"])
def test_every_launch_is_guarded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    @contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    launched: list[int] = []
    module = import_module(f"florence_fast.ops.{name}.cpp" if native.extension() else "florence_fast.ops.nms.torch")
    function = {"l2_normalize": "l2_normalize_fwd", "nms": "nms_kept"}[name]
    real = getattr(module, function)
    monkeypatch.setattr(registration, "_on_device_of", guard)
    monkeypatch.setattr(module, function, lambda *args: (launched.append(len(inside)), real(*args))[1])
    args, kwargs = ops.OPS[name].example("cpu")
    ops.OPS[name].function(*args, **kwargs)
    assert launched == [1]


def test_the_compiler_is_not_imported_before_it_is_used() -> None:
    program = """
import sys, torch
from florence_fast import ops
for entry in ops.OPS.values():
    args, kwargs = entry.example("cpu")
    entry.function(*args, **kwargs)
assert "torch._dynamo" not in sys.modules, sorted(n for n in sys.modules if n.startswith("torch._dynamo"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_explain_lists_every_op_and_backend() -> None:
    rows = {(row.op, row.backend): row.reasons for row in ops.explain("cpu")}
    assert set(rows) == {(op, name) for op in ops.OPS for name in dispatch.BACKENDS}
    assert rows["window_attention", "triton"] == ["Triton's interpreter is for proofs: it runs only where it is forced"]
    assert rows["window_attention", "torch"] == rows["window_attention", "reference"] == []


def test_asking_for_the_backends_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ops.explain("cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_runs_its_own_example(name: str) -> None:
    entry = ops.OPS[name]
    args, kwargs = entry.example("cpu")
    torch.testing.assert_close(entry.function(*args, **kwargs), entry.reference(*args, **kwargs))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collect the arguments of each call of l2_normalize that torch's dispatcher sees."""
    op = ops.OPS["l2_normalize"].forward_op
    seen, original = [], op._op
    monkeypatch.setattr(op, "_op", lambda *args: (seen.append(args), original(*args))[1])
    return seen


def test_plain_calls_without_gradients_pass_the_dispatcher_by(dispatched: list[Any]) -> None:
    x = torch.randn(3, 8)
    expected = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(ops.l2_normalize(x), expected)
    with torch.no_grad():
        weight = torch.nn.Parameter(x)
        out = ops.l2_normalize(weight)
    torch.testing.assert_close(out, expected)
    with torch.inference_mode():
        ops.l2_normalize(weight)
    assert not dispatched and not out.requires_grad


@pytest.mark.skipif(native.extension() is None, reason=NOT_BUILT)
def test_an_eager_call_of_window_attention_makes_at_most_40_calls() -> None:
    """What Python does around the kernel is most of the time of a small call."""
    args, kwargs = ops.OPS["window_attention"].example("cpu")
    calls: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    with torch.no_grad():
        ops.window_attention(*args, **kwargs)
        sys.setprofile(note)
        try:
            ops.window_attention(*args, **kwargs)
        finally:
            sys.setprofile(None)
    assert "window_attention" in calls and len(calls) <= 40, calls


def _with_a_gradient(x: torch.Tensor) -> None:
    ops.l2_normalize(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def _profiled(x: torch.Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.l2_normalize(x)
    assert any(event.key == "florence_fast::l2_normalize" for event in profile.key_averages())


def _fake(x: torch.Tensor) -> None:
    with FakeTensorMode() as mode:
        assert ops.l2_normalize(mode.from_tensor(x)).shape == x.shape


def _traced_to_a_graph(x: torch.Tensor) -> None:
    graph = make_fx(lambda x: ops.l2_normalize(x))(x)
    assert any("l2_normalize" in str(node.target) for node in graph.graph.nodes)


def _traced_by_jit(x: torch.Tensor) -> None:
    traced = torch.jit.trace(lambda x: ops.l2_normalize(x), (x,))
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), torch.nn.functional.normalize(other, dim=-1))


class _Subclass(torch.Tensor):
    """A tensor that has to see what is done to it."""


def _of_a_subclass(x: torch.Tensor) -> None:
    assert type(ops.l2_normalize(x.as_subclass(_Subclass))) is _Subclass


@pytest.mark.parametrize(
    "call", [_with_a_gradient, _profiled, _fake, _traced_to_a_graph, _traced_by_jit, _of_a_subclass]
)
def test_the_dispatcher_sees_what_concerns_it(call: Callable[[torch.Tensor], None], dispatched: list[Any]) -> None:
    call(torch.randn(3, 8))
    assert dispatched
