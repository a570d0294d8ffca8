"""`make gpu` without a GPU: the rehearsal from end to end, and what a row, a stop and a failure leave behind."""

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bench import harness, machine
from bench.budget import predicted
from bench.competitors import library
from bench.gpu import command as gpu
from bench.gpu import self_test, stages
from bench.ops import window_attention
from bench.session import Missing, OutOfTime, Plan, Session, modes_of
from bench.store import Store
from florence_fast import timing
from florence_fast.ops.window_attention.cases import SUBJECT, Shape, eager
from florence_fast.timing import MIN_SAMPLE_SECONDS

OPS = stages.ops()
TINY = {"tiny": Shape(1, 4, 5, 1, window=3, shift=1, head_dim=16)}
EAGER = library(SUBJECT.rivals["eager"])


def op_with(**competitors: Callable) -> SimpleNamespace:
    """Window attention at one tiny size and always on the CPU, with eager and these competitors."""
    replaced = {
        "REHEARSAL": TINY,
        "COMPETITORS": {"eager": EAGER, **competitors},
        "SLOW_TO_BUILD": (),
        "setup": lambda shape, dtype, device, seed: window_attention.setup(shape, dtype, "cpu", seed),
    }
    return SimpleNamespace(**{**vars(window_attention), **replaced})


@pytest.fixture
def open_session(tmp_path) -> Callable[..., Session]:
    """Start anew with what the file holds, as the next process would."""

    def start(minutes: float = 5, sources: str | None = None) -> Session:
        facts = machine.facts(torch.device("cpu"))
        facts["sources"] = sources or facts["sources"]
        store = Store(tmp_path / "gpu_here.json", facts["sources"])
        clock, plan = machine.Clock(minutes), Plan(rehearse=True)
        return Session(
            torch.device("cpu"), facts, store, tmp_path, clock, plan, seconds=0.0, copy_rate=1e9, matrix_rate=1e9
        )

    return start


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The whole command, once."""
    folder = tmp_path_factory.mktemp("rehearsal")
    code = gpu.main(["--rehearse", "--out", str(folder)])
    (path,) = folder.glob("gpu_*.json")
    return code, json.loads(path.read_text()), folder


def test_the_rehearsal_passes_and_runs_every_stage(rehearsed):
    code, stored, _ = rehearsed
    assert code == 0
    ended = {name: record["status"] for name, record in stored["stages"].items()}
    assert ended == {
        "environment": "done",
        "correctness": "done",
        "self_test": "done",
        **{op.OP: "done" for op in OPS},
        "tune": "done",
        "inference": "done",
        "training": "done",
        "pretraining": "done",
        "first_call": "done",
        "other_dtypes": "done",
        "demo": "skipped",
    }


def test_every_row_has_every_key_and_every_competitor_a_row(rehearsed):
    rows = rehearsed[1]["rows"]
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same keys in the same order"
    wanted = {"device", "driver", "torch", "triton", "commit", "date", "shape", "dtype", "mode", "competitor"}
    wanted |= {"median", "q20", "q80", "peak_bytes", "bytes_moved", "flops", "copy_ratio", "predicted_clocks"}
    wanted |= {"measured_clocks", "status", "reason", "errors", "sources", "copy_bytes_per_second"}
    assert wanted <= set(rows[0])
    of_ops = {op.OP for op in OPS}
    found = [(row["stage"], row["shape"], row["mode"], row["competitor"]) for row in rows if row["stage"] in of_ops]
    assert {row["stage"] for row in rows} - of_ops == {"inference", "training", "pretraining", "first_call"}
    assert sorted(found) == sorted(
        (op.OP, shape, mode, competitor)
        for op in OPS
        for shape in op.REHEARSAL
        for mode in modes_of(op)
        for competitor in op.COMPETITORS
    )


def test_a_row_has_a_time_or_the_reason_for_none(rehearsed):
    rows = rehearsed[1]["rows"]
    for row in rows:
        if row["status"] == "timed":
            assert 0 < row["q20"] <= row["median"] <= row["q80"]
            assert all(error["passed"] for error in row["errors"])
        else:
            assert row["status"] == "missing" and row["reason"] and row["median"] is None
    timed = {row["competitor"] for row in rows if row["status"] == "timed"}
    assert {"eager", "sdpa + mask", "ours (torch)", "torch.compile", "flex_attention"} <= timed


def test_our_kernels_are_rehearsed_through_the_interpreter(rehearsed):
    rows = [row for row in rehearsed[1]["rows"] if row["competitor"] == "ours (triton)"]
    without = {row["op"]: row["reason"] for row in rows if row["status"] != "timed"}
    assert all("no Triton kernel for" in reason for reason in without.values()), without
    assert len({row["op"] for row in rows} - set(without)) >= len(OPS) - 1


def test_a_second_start_times_nothing_again(rehearsed, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError("a finished row was timed again")

    monkeypatch.setattr(harness, "time_calls", refuse)
    args = ["--rehearse", "--out", str(rehearsed[2]), "--stage", "window_attention", "--stage", "correctness"]
    assert gpu.main(args) == 0
    assert "[correctness] finished at an earlier start" in capsys.readouterr().out
    assert gpu.main([*args[:5], "--fresh"]) == 1, "--fresh must time again"


def test_a_run_killed_between_two_rows_goes_on_with_the_third(open_session, monkeypatch):
    first, put, stored = open_session(), Store.put, []

    def put_two_rows(store, row):
        if len(stored) == 2:
            raise KeyboardInterrupt
        stored.append(row["key"])
        put(store, row)

    monkeypatch.setattr(Store, "put", put_two_rows)
    with pytest.raises(KeyboardInterrupt):
        harness.run_op(op_with(), first, ("fp32",))
    made_again = []
    monkeypatch.setattr(Store, "put", lambda store, row: made_again.append(row["key"]) or put(store, row))
    second = open_session()
    harness.run_op(op_with(), second, ("fp32",))
    assert len(stored) == 2 and len(made_again) == 1 and not set(stored) & set(made_again)
    assert set(second.store.rows) == {*stored, *made_again}


def test_rows_of_other_sources_are_made_again(open_session):
    harness.run_op(op_with(), open_session(sources="old"), ("fp32",))
    session = open_session(sources="new")
    harness.run_op(op_with(), session, ("fp32",))
    assert {row["sources"] for row in session.store.rows.values()} == {"new"}


def wrong_values(**arguments):
    return eager(**arguments) * 1.01


def wrong_gradient(qkv, rel_pos_bias_table, **prepared):
    return eager(qkv, rel_pos_bias_table.detach() * 0.5 + rel_pos_bias_table * 0.5, **prepared)


@pytest.mark.parametrize(
    ("function", "named"), [(wrong_values, "out, dqkv"), (wrong_gradient, "drel_pos_bias_table")], ids=["out", "table"]
)
def test_a_wrong_competitor_is_red_and_gets_no_time(open_session, function, named):
    from florence_fast.ops.window_attention.cases import rival

    session = open_session()
    with pytest.raises(stages.StageFailed, match="3 rows with wrong values, 0 with an error"):
        stages.measure(op_with(bad=library(rival(function))))(session)
    rows = [row for row in session.store.rows.values() if row["competitor"] == "bad"]
    assert [row["status"] for row in rows] == ["wrong"] * 3
    assert all(row["median"] is None and row["errors"] for row in rows)
    assert f"too far from float64: {named}" in rows[0]["reason"]
    assert {row["status"] for row in session.store.rows.values() if row["competitor"] == "eager"} == {"timed"}


def test_an_error_is_a_row_that_stops_nobody_and_is_not_tried_again(open_session):
    tries = []

    def broken(inputs, plan):
        tries.append(1)
        raise RuntimeError("out of\nluck")

    asked = []

    def absent(inputs, plan):
        asked.append(1)
        raise Missing("not installed")

    for _ in range(2):
        session = open_session()
        for _ in range(2):
            harness.run_op(op_with(broken=broken, absent=absent), session, ("fp32",))
    rows = {row["competitor"]: row for row in session.store.rows.values()}
    assert (len(tries), len(asked)) == (1, 2), "an error is final; what was missing is asked again by the next run"
    assert (rows["broken"]["status"], rows["absent"]["status"]) == ("error", "missing")
    assert "RuntimeError: out of" in rows["broken"]["reason"] and rows["absent"]["reason"] == "not installed"


def test_the_time_limit_stops_between_rows(open_session):
    session = open_session(minutes=0)
    stage = stages.Stage("window_attention", "", stages.measure(op_with()), once=False)
    record = gpu.run_stage(stage, session)
    assert record["status"] == "to go on" and not session.store.rows


def test_without_a_gpu_one_sentence_says_what_would_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "none")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and shown.startswith("No GPU that PyTorch can use")
    assert all(op.OP in shown for op in OPS)
    assert not (tmp_path / "none").exists()


def test_without_torch_only_a_machine_with_a_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("No GPU and no PyTorch here")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu.main([]) == 2
    assert "PyTorch is not installed for" in capsys.readouterr().err


def test_a_failing_stage_fails_the_rehearsal_and_not_the_others(monkeypatch, capsys, tmp_path):
    def explode(session):
        raise ZeroDivisionError("half of nothing")

    ran = []
    both = [stages.Stage("first", "", explode), stages.Stage("second", "", lambda session: ran.append(1) or {})]
    monkeypatch.setattr(stages, "stages", lambda: both)
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert ran == [1]
    shown = capsys.readouterr().out
    assert "ZeroDivisionError: half of nothing" in shown and f"{'second':28} done" in shown


def test_without_the_rates_of_the_device_nothing_is_timed(monkeypatch, tmp_path):
    def explode(session):
        raise RuntimeError("no copy")

    ran = []
    first = stages.Stage("environment", "", explode, once=False, always=True)
    monkeypatch.setattr(stages, "stages", lambda: [first, stages.Stage("second", "", lambda s: ran.append(1) or {})])
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert not ran


def test_an_unknown_stage_is_wrong_usage(capsys):
    assert gpu.main(["--stage", "windows"]) == 2
    assert "known: environment, correctness" in capsys.readouterr().err


def test_without_pytest_the_checks_of_verify_stand_in(open_session, monkeypatch):
    session, commands = open_session(), []
    session.plan = Plan(rehearse=False)
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None if name == "pytest" else object())
    monkeypatch.setattr(
        stages, "child", lambda session, name, command, limit: commands.append(name) or {"exit_code": 0}
    )
    details = stages.correctness(session)
    assert commands == ["verify"] and details["absent"] == ["pytest"]


def test_a_child_is_ended_by_its_limit_or_by_the_end_of_the_run(open_session):
    command, start = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], time.monotonic()
    with pytest.raises(stages.StageFailed, match="took more than 1 s"):
        stages.child(open_session(), "sleeper", command, limit=1)
    with pytest.raises(OutOfTime):
        stages.child(open_session(minutes=0.01), "sleeper", command, limit=60)
    assert time.monotonic() - start < 20
    with pytest.raises(stages.StageFailed, match="exit code 3") as failed:
        stages.child(open_session(), "quitter", [sys.executable, "-c", "print('bye'); exit(3)"], limit=60)
    assert failed.value.details["tail"] == ["bye"]


def test_the_self_test_tells_a_wrong_product(monkeypatch, open_session):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert stages.self_test(open_session())["unsafe_form_is_right"]
    monkeypatch.setattr(self_test, "transposed_product_error", lambda *args: (float("nan"), 1e-3))
    assert not stages.self_test(open_session())["unsafe_form_is_right"]


def test_the_formulas_count_each_stream_and_product_once():
    shape = window_attention.SHAPES["swin_t_stage1_224"]
    tokens, channels = 128 * 56 * 56, 96
    assert window_attention.bytes_moved(shape, torch.bfloat16, "forward") == tokens * 4 * channels * 2
    assert window_attention.bytes_moved(shape, torch.bfloat16, "backward") == tokens * 7 * channels * 2
    assert window_attention.units(shape) == 128 * 64 * 3
    assert window_attention.flops(shape, "forward") == 128 * 64 * 3 * 2 * (2 * 49 * 49 * 32)
    both = window_attention.flops(shape, "both")
    assert both == window_attention.flops(shape, "forward") + window_attention.flops(shape, "backward")


def test_predicted_clocks_are_those_of_the_budget_or_none(monkeypatch, tmp_path):
    path = tmp_path / "budget.json"
    monkeypatch.setattr(predicted, "BUDGET", path)
    assert predicted.predicted_clocks("a", 90) is None
    rows = [{"case": "a", "arch": 90, "clocks": 400}, {"case": "a", "arch": 90, "clocks": 50.5}]
    path.write_text(json.dumps({"rows": [*rows, {"case": "a", "arch": 80, "clocks": 1}]}))
    assert predicted.predicted_clocks("a", 90) == 450.5
    assert predicted.predicted_clocks("b", 90) is None
    path.write_text("[1, 2")
    assert predicted.predicted_clocks("a", 90) is None


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "gpu_x.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"gpu_x\.json must hold results of bench\.gpu, got TypeError"):
        Store(tmp_path / "gpu_x.json", "s")


class Event:
    """A CUDA event that a CPU can record."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def pretended_gpu(monkeypatch, open_session) -> Session:
    """A session that measures as on a GPU, while the work is done by the CPU."""
    card = SimpleNamespace(L2_cache_size=1 << 14, major=9, minor=0, multi_processor_count=10)
    answers = {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 1000}
    for name, answer in {**answers, "max_memory_allocated": 5000, "get_device_properties": card}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(machine, "smi", lambda *fields: dict(zip(fields, ("1500", "50", "[N/A]"), strict=False)))
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 2e-2)  # long enough on a busy machine too
    session = open_session()
    session.device = torch.device("cuda")
    session.facts |= {"arch": 90, "num_sms": 10}
    return session


def test_on_a_gpu_inputs_rotate_and_rows_get_memory_and_clocks(pretended_gpu, monkeypatch):
    made = []
    real = harness.call_in_mode
    monkeypatch.setattr(harness, "call_in_mode", lambda f, *args: made.append(args[-1]) or real(f, *args))
    harness.run_op(op_with(), pretended_gpu, ("fp32",))
    rows = {row["mode"]: row for row in pretended_gpu.store.rows.values()}
    for mode, row in rows.items():
        moved = row["bytes_moved"]
        assert made.count(mode) == -(-2 * (1 << 14) // moved) > 1, "copies that are twice the cache"
        assert row["status"] == "timed" and row["samples"] >= 10
        assert row["repeats"] >= 2 or row["median"] > MIN_SAMPLE_SECONDS / 2, "short calls are repeated in a sample"
        assert row["peak_bytes"] == 4000
        assert (row["sm_clock_mhz"], row["temperature"], row["power_watts"]) == (1500, 50, None)
        assert row["measured_clocks"] == pytest.approx(
            row["median"] * 1500e6 * 10 / window_attention.units(TINY["tiny"])
        )


def test_a_lost_device_ends_the_stage_and_the_next_start_goes_round_its_cause(pretended_gpu, monkeypatch):
    def lose(inputs, plan):
        def refuse(*args):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
        refuse()

    op = op_with(lose=lose)
    op.COMPETITORS = dict(reversed(op.COMPETITORS.items()))
    stage = stages.Stage("window_attention", "", stages.measure(op), once=False)
    record = gpu.run_stage(stage, pretended_gpu)
    assert record["status"] == "failed" and "DeviceLost" in record["reason"]
    assert {row["competitor"] for row in pretended_gpu.store.rows.values()} == {"lose"}
    assert pretended_gpu.store.finished("window_attention|tiny|fp32|forward|lose")


def test_an_error_while_a_row_is_completed_is_a_row(pretended_gpu, monkeypatch):
    def refuse(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    harness.run_op(op_with(), pretended_gpu, ("fp32",))
    rows = list(pretended_gpu.store.rows.values())
    assert [row["status"] for row in rows] == ["error"] * 3 and rows[0]["median"] is None
