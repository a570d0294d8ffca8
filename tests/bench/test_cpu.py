"""``python -m bench.cpu``: subjects run at tiny sizes, rows are whole, and a second start measures nothing again."""

import json

import pytest

from bench.cpu import command as cpu
from bench.cpu.rows.base import Run, Skipped, Subject, peak_of
from bench.machine import Clock
from bench.report.rows import read_rows
from bench.store import Store


@pytest.fixture
def run(tmp_path):
    return Run({"sources": "x", "device": "CPU, test"}, Store(tmp_path / "cpu.json", "x"), Clock(1), tiny=True)


SUBJECT = Subject("sleep", "small", {}, "fp32", "forward")


@pytest.mark.parametrize("name", ["contrastive", "grad_cache"])
def test_a_rehearsal_stores_rows_that_the_report_reads(name, tmp_path, capsys):
    assert cpu.main(["--rehearse", "--only", name, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "cpu.json")
    timed = [row for row in rows if row["status"] == "timed"]
    assert {row["op"] for row in timed} == {{"contrastive": "contrastive_loss"}.get(name, name)}
    assert any(row["competitor"].startswith("ours") for row in timed)
    assert all(row["threads"] >= 1 and row["torch"] and row["sources"] for row in rows)
    assert (tmp_path / "REPORT.md").is_file()
    if name == "contrastive":
        assert all(row["peak_bytes"] > 0 for row in timed if row["shape"].startswith("peak memory"))
    capsys.readouterr()
    assert cpu.main(["--rehearse", "--only", name, "--out", str(tmp_path)]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if " ms" in line and line.startswith("  ")]


def test_one_that_cannot_take_part_and_one_that_fails_are_rows(run):
    def absent():
        raise Skipped("not installed")

    def broken():
        raise ValueError("no such model")

    run.compare(SUBJECT, {"ours": lambda: lambda: None, "absent": absent, "broken": broken})
    found = {row["competitor"]: (row["status"], row["reason"]) for row in run.store.rows.values()}
    assert found["absent"] == ("missing", "not installed")
    assert found["broken"] == ("error", "ValueError: no such model")
    assert found["ours"][0] == "timed"


def test_a_child_that_fails_is_a_row_with_its_last_words(run):
    run.peak(SUBJECT, "ours", "bench.cpu.rows.contrastive", "nobody's loss", "8", "8")
    [row] = run.store.rows.values()
    assert row["status"] == "error" and "nobody's loss" in row["reason"]


def test_when_the_time_is_over_nothing_begins(run):
    run.clock = Clock(0)
    run.compare(SUBJECT, {"ours": lambda: pytest.fail("it began")})
    assert run.store.rows == {}


def test_peak_memory_is_that_of_the_call():
    size = 64 << 20
    found = peak_of(lambda: bytearray(size).find(b"x"))
    assert 0.95 * size <= found["peak_bytes"] < 1.25 * size and found["seconds"] > 0


def test_unknown_subject_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cpu.main(["--only", "everything"])
    assert stop.value.code == 2 and "everything" in capsys.readouterr().err


def test_the_file_of_results_is_json_with_rows(run, tmp_path):
    run.put(SUBJECT, "ours", {"status": "missing", "reason": "because"})
    assert [row["competitor"] for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]] == ["ours"]
