"""FLORENCE_FAST_AUTOTUNE: the whole way from a first call to a file and back, with a clock that lies as it is told.

Kernels run in Triton's interpreter, for which a CPU tensor is taken for one on a GPU here.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from florence_fast.kernels import configs
from florence_fast.kernels.configs import Config
from florence_fast.kernels.configs.search import candidates
from florence_fast.ops import OPS, _autotune, _measured_configs, backend, layer_norm
from florence_fast.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
FORWARD, BACKWARD = "layer_norm_fwd", "layer_norm_bwd"
Timed = list[tuple[str, Config]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tuning is on, and keeps what it finds here."""
    monkeypatch.setenv("FLORENCE_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("FLORENCE_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_autotune, "_on_gpu", lambda x: True)
    forget(monkeypatch)
    with backend("triton"):
        yield tmp_path


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be as a new process is."""
    monkeypatch.setattr(_measured_configs, "_known", {})
    monkeypatch.setattr(_autotune, "_given_up", set())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[str, int], float]], Timed]:
    """Seconds by kernel and number of warps in force, 1 for the others; also what was timed."""

    def start(seconds: dict[tuple[str, int], float]) -> Timed:
        timed: Timed = []

        def lie(calls: dict[str, Any], device: torch.device, seconds_of_each: float) -> dict[str, Timing]:
            kernel, config = configs._thread.forced[-1]
            timed.append((kernel, config))
            second = seconds.get((kernel, config.num_warps), 1.0)
            return {name: Timing(second, second, second, 3, 1) for name in calls}

        monkeypatch.setattr(_autotune, "time_calls", lie)
        return timed

    return start


def call(channels: int = 32, rows: int = 9) -> torch.Tensor:
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0))
    return layer_norm(x, torch.ones(channels), torch.zeros(channels))


def stored(cache: Path) -> dict[str, Any]:
    (file,) = (cache / "configs").glob("*.json")
    return json.loads(file.read_text())


def launched(channels: int = 32) -> Config:
    """What a call launches its kernel with, once it is tuned."""
    with configs.watched() as requests:
        call(channels)
    (request,) = set(requests)
    with configs.measured(_measured_configs.measured_configs(torch.device("cpu")).table):
        return configs.usual(request)


def test_a_first_call_tunes_stores_and_is_launched_so_from_then_on(cache, clock, caplog):
    with backend("torch"):
        expected = call()
    timed = clock({(FORWARD, 2): 0.5, (FORWARD, 8): 0.9})
    with caplog.at_level(logging.INFO, "florence_fast"):
        out = call()
    torch.testing.assert_close(out, expected)
    assert {kernel for kernel, _ in timed} == {FORWARD} and len({config for _, config in timed}) > 5
    found = stored(cache)
    ((key, entry),) = found["table"][FORWARD].items()
    assert entry["num_warps"] == 2 and key.startswith("float32/") and set(entry) == set(vars(Config()))
    assert {"device", "arch", "num_sms", "sources"} <= set(found)
    assert "tuned layer_norm_fwd" in caplog.text and "50.0% faster" in caplog.text
    timed.clear()
    torch.testing.assert_close(call(), expected)
    assert not timed and launched() == Config(**entry)


def test_each_kernel_of_a_backward_is_tuned_by_the_call_that_needs_it(cache, clock):
    timed = clock({(BACKWARD, 4): 0.5})
    x = torch.randn(9, 32, requires_grad=True)
    layer_norm(x).sum().backward()
    assert {kernel for kernel, _ in timed} == {FORWARD, BACKWARD}
    table = stored(cache)["table"]
    assert table[BACKWARD].popitem()[1]["num_warps"] == 4
    assert Config(**table[FORWARD].popitem()[1]) == timed[0][1], "nothing was faster: the default is kept, and stored"


UNTUNED = {"conv_embed", "linear", "nms", "batched_nms"}
"""They have no kernel, or none whose launch can be chosen."""


@pytest.mark.parametrize("op", [name for name in OPS if name not in UNTUNED])
def test_the_kernels_of_every_op_are_tuned_forward_and_backward(cache, clock, monkeypatch, caplog, op):
    timed = clock({})
    monkeypatch.setattr(_autotune, "candidates", lambda before: candidates(before)[-1:])
    args, options = OPS[op].example("cpu")
    args = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    out = OPS[op].function(*args, **options)
    sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    table = stored(cache)["table"]
    assert set(table) == {kernel for kernel, _ in timed} and len(table) >= 2
    assert all(
        Config(**entry) == timed_first(timed, kernel) for kernel, keys in table.items() for entry in keys.values()
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def timed_first(timed: Timed, kernel: str) -> Config:
    return next(config for name, config in timed if name == kernel)


def test_another_process_reads_what_one_has_found(cache, clock):
    clock({(FORWARD, 2): 0.5})
    call()
    code = """
import torch
from florence_fast.ops import _autotune, backend, layer_norm
from florence_fast.kernels import configs

def timed(*_):
    raise AssertionError("tuned again")

_autotune._on_gpu, _autotune.time_calls = lambda x: True, timed
seen, usual = [], configs.usual
configs.usual = lambda request: seen.append(usual(request)) or seen[-1]
with backend("triton"):
    layer_norm(torch.randn(9, 32), torch.ones(32), torch.zeros(32))
print({config.num_warps for config in seen})
"""
    assert child(code) == "{2}"
    assert "tuned again" in child(code.replace("9, 32", "9, 64").replace("(32)", "(64)"), fails=True)


def child(code: str, fails: bool = False) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout.strip()


def test_off_nothing_is_measured_read_or_written(cache, clock, monkeypatch):
    timed = clock({(FORWARD, 2): 0.5})
    call()
    timed.clear()
    monkeypatch.setattr(_autotune, "run", lambda *args: pytest.fail("asked for measurements"))
    for value in ("0", ""):
        monkeypatch.setenv("FLORENCE_FAST_AUTOTUNE", value)
        call()
    monkeypatch.setenv("FLORENCE_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="unknown FLORENCE_FAST_AUTOTUNE 'yes'"):
        call()
    monkeypatch.setenv("FLORENCE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(_autotune, "_on_gpu", lambda x: x.is_cuda)
    call()
    assert not timed, "a tensor on a CPU has nothing to be tuned"


ENTRIES = ('{"warps": 1}', '{"num_warps": "2"}', '{"num_warps": 0}', "[2]", "2")
NO_TABLES = ("", "{", "[]", "{}", '{"table": 3}', '{"table": {"k": 1}}')


@pytest.mark.parametrize("text", [*NO_TABLES, *(f'{{"table": {{"k": {{"a": {entry}}}}}}}' for entry in ENTRIES)])
def test_a_file_that_is_no_table_is_passed_over_with_one_warning(cache, clock, monkeypatch, text):
    clock({(FORWARD, 2): 0.5})
    call()
    (file,) = (cache / "configs").glob("*.json")
    file.write_text(text)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="holds no table of launch configurations") as told:
        call()
        call(64)
    assert len(told) == 1
    assert len(stored(cache)["table"][FORWARD]) == 2, "it is written anew"


def test_a_folder_that_cannot_be_written_costs_one_warning(cache, clock, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("FLORENCE_FAST_CACHE_DIR", str(cache / "file"))
    timed = clock({(FORWARD, 2): 0.5})
    with pytest.warns(RuntimeWarning, match="kept for this process alone") as told:
        call()
        call(64)
    timed.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert len(told) == 1 and not timed and launched().num_warps == 2


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    code = """
import sys
from pathlib import Path
from florence_fast.kernels.configs import Config
from florence_fast.ops._measured_configs import MeasuredConfigs

table = MeasuredConfigs(Path(sys.argv[1]), {"device": "cpu"})
for i in range(16):
    table.add("kernel", f"{sys.argv[2]}/{i}", Config(num_warps=1 + i % 8))
    table.add("kernel", "shared", Config(num_warps=8))
"""
    path, environment = tmp_path / "configs" / "table.json", {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], env=environment, cwd=ROOT) for i in range(2)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = json.loads(path.read_text())["table"]["kernel"]
    assert len(found) == 2 * 16 + 1 and {entry["num_warps"] for entry in found.values()} == set(range(1, 9))
    assert sorted(file.name for file in path.parent.iterdir()) == ["table.json", "table.lock"]


def test_who_was_first_is_believed(tmp_path):
    ours, theirs = (_measured_configs.MeasuredConfigs(tmp_path / "table.json", {}) for _ in range(2))
    theirs.add("kernel", "key", Config(num_warps=2))
    ours.add("kernel", "key", Config(num_warps=8))
    assert ours.table["kernel"]["key"]["num_warps"] == 2


def test_a_candidate_with_other_values_never_wins(cache, clock, monkeypatch, caplog):
    timed = clock({(FORWARD, 2): 0.1, (FORWARD, 8): 0.5})
    real = _autotune._tensors

    def spoiled(out: Any) -> list[torch.Tensor]:
        found = [x.clone() for x in real(out)]
        if configs._thread.forced and configs._thread.forced[-1][1].num_warps == 2:
            found[0].view(-1)[0] += 1
        return found

    monkeypatch.setattr(_autotune, "_tensors", spoiled)
    call()
    assert (FORWARD, 2) not in [(kernel, config.num_warps) for kernel, config in timed]
    assert "gives other values" in caplog.text and launched().num_warps == 8


def test_a_candidate_that_cannot_be_launched_is_passed_by(cache, clock, monkeypatch):
    clock({(FORWARD, 8): 0.5})
    real = _autotune._apart

    def refuse(*args: Any) -> bool:
        if configs._thread.forced and configs._thread.forced[-1][1].num_stages == 2:
            raise RuntimeError("out of resource: shared memory")
        return real(*args)

    monkeypatch.setattr(_autotune, "_apart", refuse)
    call()
    assert launched().num_warps == 8 and launched().num_stages != 2


def test_a_small_lead_is_none(cache, clock):
    timed = clock({(FORWARD, 2): 0.995})
    call()
    assert launched() == timed[0][1]


def test_what_differs_from_run_to_run_is_not_tuned_and_not_tried_again(cache, clock, monkeypatch, caplog):
    timed = clock({(FORWARD, 2): 0.5})
    monkeypatch.setattr(_autotune, "_apart", lambda found, wanted: True)
    call()
    call()
    assert not timed and not (cache / "configs").exists()
    assert caplog.text.count("two runs alike give different values") == 1


def test_where_memory_ends_the_call_has_its_result_all_the_same(cache, monkeypatch, caplog):
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(_autotune, "time_calls", full)
    assert torch.isfinite(call()).all() and torch.isfinite(call()).all()
    assert caplog.text.count("no memory for a second run: 2 GiB") == 1


def test_nothing_is_measured_while_a_graph_is_captured(cache, clock, monkeypatch):
    timed = clock({(FORWARD, 2): 0.5})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.isfinite(call()).all() and not timed and not (cache / "configs").exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call()
    assert timed


def test_a_compiled_call_is_tuned_when_it_runs_and_never_while_it_is_traced(cache, clock, monkeypatch):
    timed, traced = clock({(FORWARD, 2): 0.5}), []
    real = _autotune.run
    monkeypatch.setattr(
        _autotune, "run", lambda *args, **kw: (traced.append(torch.compiler.is_compiling()), real(*args, **kw))[1]
    )
    compiled = torch.compile(lambda x: layer_norm(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(9, 32)
    torch.testing.assert_close(compiled(x), layer_norm(x))
    assert timed and not any(traced) and launched().num_warps == 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _autotune._must_not_wait()


def test_a_forced_candidate_is_of_its_thread_alone():
    seen = []
    with configs.forced("k", Config(8), this_thread=True), configs.watched(this_thread=True) as requests:

        def ask() -> None:
            seen.append(configs.config_of("k", 80, torch.float32, 1, 1, Config()))

        other = threading.Thread(target=ask)
        other.start()
        other.join()
        ask()
    assert seen == [Config(), Config(8)] and len(requests) == 1


@pytest.mark.parametrize(
    ("found", "wanted", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, 2.0005], False),
        ([1.0, 2.0], [1.0, 2.1], True),
        ([float("-inf"), float("nan")], [float("-inf"), float("nan")], False),
        ([float("inf"), 1.0], [float("-inf"), 1.0], True),
        ([float("nan"), 1.0], [0.0, 1.0], True),
        ([1.0], [1.0, 2.0], True),
        ([], [], False),
        ([1e-9], [0.0], True),
    ],
)
def test_values_are_compared_where_they_are_numbers(found, wanted, apart):
    assert _autotune._apart([torch.tensor(found)], [torch.tensor(wanted)]) == apart


def test_whole_numbers_must_be_equal():
    assert not _autotune._apart([torch.tensor([1, 2])], [torch.tensor([1, 2])])
    assert _autotune._apart([torch.tensor([1, 2])], [torch.tensor([1, 3])])


def test_a_table_of_another_device_or_source_has_another_name(monkeypatch, tmp_path):
    monkeypatch.setenv("FLORENCE_FAST_CACHE_DIR", str(tmp_path))
    device, names = torch.device("cpu"), set()
    for change in ({}, {"device": "NVIDIA H200"}, {"num_sms": 108}, {"sources": "of other kernels"}):
        forget(monkeypatch)
        facts = _measured_configs.facts_of(device) | change
        with monkeypatch.context() as patched:
            patched.setattr(_measured_configs, "facts_of", lambda device, facts=facts: facts)
            names.add(_measured_configs.measured_configs(device).path.name)
    assert len(names) == 4 and any(name.startswith("nvidia_h200-") for name in names)
    assert not list(tmp_path.iterdir()), "reading makes no folder"


def test_candidates_are_those_around_what_is_launched_now():
    default = Config(4, 2, 4)
    assert default not in candidates(default) and Config(8, 2, 4) in candidates(default)
