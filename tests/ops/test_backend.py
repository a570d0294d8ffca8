"""How a backend is chosen and forced, and what is said where it cannot run."""

import pytest
import torch

from florence_fast import native, ops
from florence_fast.ops import _backend

NOT_HERE = "kernels run on the CPU only under TRITON_INTERPRET=1"
NOT_BUILT = "the native extension was not built"
AUTO = "cpp" if native.extension() else "torch"


def call() -> torch.Tensor:
    (args, kwargs) = ops.OPS["window_attention"].example("cpu")
    return ops.window_attention(*args, **kwargs)


def chosen() -> str:
    (args, kwargs) = ops.OPS["window_attention"].example("cpu")
    return _backend.choose("window_attention", *args, **kwargs)


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
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        call()


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ops.OPS["window_attention"]
    crippled = _backend.OpEntry(entry.name, entry.function, entry.reference, lambda *_, **__: ["a", "b"], entry.example)
    monkeypatch.setitem(ops.OPS, "window_attention", crippled)
    with ops.backend("torch"), pytest.raises(RuntimeError, match=r"cannot run window_attention: a; b$"):
        call()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'tritn' \(did you mean 'triton'\?\)"), ops.backend("tritn"):
        call()
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "pytorch")
    with pytest.raises(ValueError, match="unknown FLORENCE_FAST_BACKEND 'pytorch'"):
        call()
    assert not _backend._forced


def test_explain_lists_every_op_and_backend() -> None:
    rows = {(row.op, row.backend): row.reasons for row in ops.explain("cpu")}
    assert set(rows) == {(op, name) for op in ops.OPS for name in _backend.BACKENDS}
    assert rows["window_attention", "triton"] == ["Triton's interpreter is for proofs: it runs only where it is forced"]
    assert rows["window_attention", "torch"] == rows["window_attention", "reference"] == []


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_runs_its_own_example(name: str) -> None:
    entry = ops.OPS[name]
    args, kwargs = entry.example("cpu")
    torch.testing.assert_close(entry.function(*args, **kwargs), entry.reference(*args, **kwargs))
