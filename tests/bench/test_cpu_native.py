"""``python -m bench.cpu.native``: subjects run at tiny sizes, rows hold all competitors, the worst decides a goal."""

import json

import pytest
import torch

from bench.cpu import native as cpu_native
from bench.cpu.native_rows import base, start, threads, towers
from bench.cpu.native_rows.base import OURS, Run, Subject, disagreements
from bench.cpu.rows.base import Skipped
from bench.machine import Clock
from bench.report import command as report
from bench.report import native_table, page
from bench.report.native_table import GOALS, Cost, Goal
from bench.report.rows import read_devices
from bench.store import Store
from florence_fast import native
from florence_fast.processor import Units

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")

FACTS = {
    "sources": "x",
    "date": "2026-01-02",
    "device": "CPU, test",
    "level": "scalar",
    "threads": 2,
    "torch": "2",
    "triton": "3",
}
SUBJECT = Subject("layer_norm_residual", "small", {}, "bf16", "forward")


@pytest.fixture
def run(tmp_path):
    return Run(dict(FACTS), Store(tmp_path / "cpu-scalar.json", "x"), Clock(1), tiny=True)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal of everything, in which no child process is started."""
    folder = tmp_path_factory.mktemp("rehearsed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "first_result", lambda name: 0.5)
        assert cpu_native.main(["--rehearse", "--out", str(folder)]) == 0
    return folder


def result(rehearsed):
    return rehearsed / native_table.file_name(native.level())


def row_of(op="layer_norm_residual", shape="small", dtype="bf16", mode="forward", errors=None, **seconds):
    """Return a row whose competitors took so many seconds."""
    times = {name.replace("_", " "): {"median": time} for name, time in seconds.items()}
    errors = errors or {}
    return {
        **FACTS,
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "mode": mode,
        "times": times,
        "errors": errors,
        "missing": {},
    }


def goal_of(op, dtype="bf16", mode="forward"):
    return next(goal for goal in GOALS if goal.op == op and getattr(goal, "dtype", dtype) == dtype)


def test_a_rehearsal_makes_a_row_for_every_goal(rehearsed):
    table = native_table.read(result(rehearsed))
    for goal in GOALS:
        found = native_table.judge(goal, table.rows)
        compiled = isinstance(goal, Goal) and "compiled" in goal.against[0]
        assert not found.failed and bool(found.values) != compiled, goal
    assert {row["op"] for row in table.rows} == {op for module in cpu_native.SUBJECTS.values() for op in module.OPS}
    assert all(row["level"] == native.level() and row["threads"] == torch.get_num_threads() for row in table.rows)
    assert all(row["commit"] and row["date"] and row["torch"] and row["sources"] for row in table.rows)
    assert (rehearsed / "docs" / table.chart).stat().st_size > 10_000
    assert read_devices(rehearsed) == []  # rows of another kind than those of bench.cpu


def test_a_second_start_measures_nothing_again(rehearsed, capsys):
    before = result(rehearsed).read_text(encoding="utf-8")
    assert cpu_native.main(["--rehearse", "--out", str(rehearsed), "--only", "windows", "--only", "threads"]) == 0
    assert result(rehearsed).read_text(encoding="utf-8") == before
    assert " ms: " not in capsys.readouterr().out


def test_fresh_measures_one_subject_again(rehearsed, capsys):
    assert cpu_native.main(["--rehearse", "--fresh", "--out", str(rehearsed), "--only", "rows"]) == 0
    measured = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " ms: " in line]
    assert measured == ["layer_norm_residual"] * 2 + ["bias_gelu"] * 2


def test_without_the_extension_the_command_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(native, "_C", None)
    assert cpu_native.main([]) == 2
    assert "C++ compiler" in capsys.readouterr().err


def test_one_turn_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cpu_native.main(["--turns", "1"])
    assert stop.value.code == 2 and "--turns must be at least 2, got 1" in capsys.readouterr().err


def test_bf16_is_left_out_where_the_processor_has_no_units(run, monkeypatch):
    """A pass of eager PyTorch would take minutes."""
    monkeypatch.setattr(base.processor, "units", lambda format: Units(False, f"no {format} units"))
    run.tiny = False
    run.compare(SUBJECT, {OURS: lambda: pytest.fail("it was built")})
    [row] = run.store.rows.values()
    assert (row["times"], row["missing"], row["status"]) == ({}, {OURS: "no bf16 units"}, "timed")


def test_each_runs_at_least_nine_times(run, monkeypatch):
    monkeypatch.setattr(base.processor, "units", lambda format: Units(True, "units"))
    run.tiny, run.seconds, counts = False, 0.0, dict.fromkeys((OURS, "eager"), 0)

    def build(name):
        def call():
            counts[name] += 1

        return call

    run.compare(SUBJECT, {name: lambda name=name: build(name) for name in counts})
    [row] = run.store.rows.values()
    assert [time["samples"] for time in row["times"].values()] == [9, 9]
    assert counts == {OURS: 11, "eager": 11}  # two of them to warm up


def test_who_is_missing_fails_or_computes_something_else_has_no_time(run):
    def absent():
        raise Skipped("not installed")

    def broken():
        raise ValueError("no such model")

    one = torch.ones(3)
    builds = {OURS: lambda: lambda: one * 1.2, "absent": absent, "broken": broken, "eager": lambda: lambda: one}
    run.compare(SUBJECT, builds)
    [row] = run.store.rows.values()
    assert list(row["times"]) == ["eager"] and row["missing"] == {"absent": "not installed"}
    assert row["errors"]["broken"] == "ValueError: no such model" and row["status"] == "error"
    assert "differs from eager by 2.0e-01" in row["errors"][OURS]


def test_a_competitor_that_was_missing_joins_and_all_take_turns_anew(run):
    def absent():
        raise Skipped("left out")

    one = {OURS: lambda: lambda: None, "compiled": absent}
    run.compare(SUBJECT, one)
    assert run.wanted(SUBJECT, one) == ["compiled"]
    run.finished.clear()
    run.compare(SUBJECT, one)
    assert run.finished == []
    run.compare(SUBJECT, one | {"compiled": lambda: lambda: None})
    assert (
        list(run.store.rows[SUBJECT.key]["times"]) == [OURS, "compiled"] and not run.store.rows[SUBJECT.key]["missing"]
    )
    run.facts["sources"] = "y"
    assert run.wanted(SUBJECT, one) == [OURS, "compiled"]


def test_when_the_time_is_over_nothing_begins(run):
    run.clock = Clock(0)
    run.compare(SUBJECT, {OURS: lambda: pytest.fail("it began")})
    assert run.store.rows == {}


def test_results_are_compared_with_the_plainest():
    a = torch.ones(4)
    assert disagreements({"ours": None, "eager": None}, 0.1) == {}
    assert disagreements({"ours": (a, 2 * a), "eager": (a, 2 * a)}, 0.0) == {}
    assert "ours" in disagreements({"ours": a * torch.nan, "eager": a}, 0.1)


def test_a_goal_is_held_to_its_worst_comparison():
    goal = goal_of("layer_norm_residual")
    rows = [row_of(shape="a", ours=1.0, eager=4.0), row_of(shape="b", ours=1.0, eager=1.5)]
    verdict = native_table.judge(goal, rows)
    assert verdict.mean == pytest.approx(6**0.5) and verdict.worst.shape == "b" and verdict.status == "short"
    assert native_table.outcome(verdict) == "short by 25.0%; 1 of 2 reach it"
    assert native_table.outcome(native_table.judge(goal, rows[:1])) == "met"
    assert native_table.outcome(native_table.judge(goal, [])) == "not measured yet"
    failed = native_table.judge(goal, [*rows[:1], row_of(shape="c", errors={"ours": "wrong"}, eager=1.0)])
    assert native_table.outcome(failed) == "short: 1 with an error (c: wrong)"


def test_window_attention_counts_with_the_fastest_of_the_others():
    times = {"ours": 1.0, "SDPA": 5.0, "matmul_and_softmax": 4.5, "our_torch_backend": 6.0}
    [value] = native_table.judge(goal_of("window_attention"), [row_of("window_attention", **times)]).values
    assert value.value == 4.5
    assert (
        native_table.judge(goal_of("window_attention"), [row_of("window_attention", mode="both", **times)]).values == ()
    )


def test_an_alternation_counts_with_the_sum_of_its_parts():
    [goal] = [goal for goal in GOALS if isinstance(goal, Cost)]
    times = {threads.NATIVE: 1.0, threads.PRODUCT: 3.0, threads.ALTERNATING: 4.4}
    verdict = native_table.judge(goal, [row_of("threads", dtype="fp32", **times)])
    assert verdict.status == "short" and native_table.shown(goal, verdict.worst.value) == "+10.0%"
    times[threads.ALTERNATING] = 4.1
    assert native_table.judge(goal, [row_of("threads", **times)]).status == "met"


def test_the_first_result_is_that_of_a_fresh_process(monkeypatch):
    monkeypatch.setattr(start, "IMPORTS", {"small": "import torch", "broken": "import torch"})
    monkeypatch.setattr(start, "MODELS", {"small": "torch.nn.Flatten()", "broken": "no_such_name"})
    assert 0 < start.first_result("small") < 5
    with pytest.raises(RuntimeError, match="no_such_name"):
        start.first_result("broken")


def test_every_competitor_that_a_goal_names_exists(rehearsed):
    named = {name for goal in GOALS if isinstance(goal, Goal) for name in (*goal.against, goal.ours)}
    rows = native_table.read(result(rehearsed)).rows
    assert (
        named
        == {OURS, towers.ACCELERATED} | {name for row in rows for name in (*row["times"], *row["missing"])} & named
    )


def test_the_page_holds_the_table_of_the_recorded_results():
    text = page.PAGE.read_text(encoding="utf-8")
    part = text.split("<!-- cpu_native:begin -->\n")[1].split("\n<!-- cpu_native:end -->")[0]
    assert part == native_table.page_text(native_table.read_all(page.RESULTS)), "run python -m bench.report.page"


def test_recorded_results_change_the_page_and_are_drawn_by_the_report(tmp_path, monkeypatch, capsys):
    assert native_table.page_text([]) == "Not measured yet."
    store = {"stages": {}, "rows": [row_of(ours=1.0, eager=4.0)]}
    (tmp_path / "cpu-scalar.json").write_text(json.dumps(store))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    part = page.cpu_native_table()
    assert "CPU, test, level scalar, 2 threads, torch 2; medians" in part
    assert "recorded 2026-01-02, before the latest change of the code that it measures" in part
    assert "| layer norm of a sum, bf16 | eager | at least 2x |  | 4.00x | small | 1,000 | 4,000 | met |" in part
    assert "(cpu_native_scalar.png)" in part
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "cpu_native_scalar.png").is_file() and "layer norm of a sum" in capsys.readouterr().out


def test_a_file_of_other_rows_is_refused_by_name(tmp_path):
    path = tmp_path / "cpu-avx2.json"
    path.write_text(json.dumps({"rows": [{"op": "x"}]}))
    with pytest.raises(ValueError, match=r"cpu-avx2\.json must hold rows of bench\.cpu\.native, got KeyError: 'shape'"):
        native_table.read(path)
