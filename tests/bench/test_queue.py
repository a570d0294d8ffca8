"""GPU_QUEUE.md is what stages, stored rows and static budget give, and says what has been measured since."""

import json

import pytest

from bench.gpu import queue, stages
from bench.report.rows import Device


def row(**entries) -> dict:
    """A row of our kernels at the first size of window attention, as a GPU would store it."""
    made = {
        **{"key": "k", "stage": "window_attention", "op": "window_attention", "shape": "swin_t_stage1_224"},
        **{"sizes": {}, "dtype": "bf16", "mode": "forward", "competitor": "ours (triton)", "status": "timed"},
        **{"device": "NVIDIA H200", "arch": 90, "median": 2.0, "q20": 1.0, "q80": 3.0},
    }
    return made | entries


@pytest.fixture
def budget() -> queue.Predicted:
    return {
        ("7x7 d32 bf16 forward shifted", 80): 1000.0,
        ("7x7 d32 bf16 forward shifted", 90): 600.0,
        ("7x7 d32 bf16 backward shifted", 90): 900.0,
    }


def lines_of(devices: list[Device], budget: queue.Predicted) -> dict[str, list[str]]:
    cells = [c for c in queue.waiting(devices, budget) if c[:2] == ["window_attention", "swin_t_stage1_224"]]
    return {c[3]: c[4:] for c in cells}


def test_the_committed_file_is_what_the_command_writes():
    assert queue.QUEUE.read_text(encoding="utf-8") == queue.queue(), "run python -m bench.gpu.queue"


def test_every_stage_has_a_line_in_the_order_in_which_they_run(tmp_path):
    lines = queue.queue(tmp_path).splitlines()
    places = [lines.index(f"| {stage.name} | {stage.what} | no |") for stage in stages.stages()]
    assert places == list(range(places[0], places[0] + len(places)))


def test_a_size_waits_with_the_sum_of_its_cases_until_our_kernels_have_a_time(budget):
    units = f"{128 * 64 * 3:,}"
    assert lines_of([], budget) == {"forward": [units, "1,000", "600"], "both": [units, "", "1,500"]}
    timed = Device("NVIDIA H200", [row()])
    assert lines_of([timed], budget) == {"forward": [units, "1,000", ""], "both": [units, "", "1,500"]}
    for left in (row(competitor="eager"), row(status="error"), row(dtype="fp16"), row(shape="other")):
        assert lines_of([Device("NVIDIA H200", [left])], budget) == lines_of([], budget)
    both = Device("NVIDIA A100", [row(arch=80)])
    assert set(lines_of([timed, both], budget)) == {"both"}


def test_without_one_of_its_cases_a_size_has_no_prediction(budget):
    del budget["7x7 d32 bf16 backward shifted", 90]
    assert set(lines_of([], budget)) == {"forward"}


def test_a_stage_says_how_many_rows_have_a_time_on_each_gpu(tmp_path):
    rows = [row(), row(key="l", status="missing", competitor="xformers"), row(key="m", device="CPU, AVX2")]
    ended = {"environment": {"status": "done", "details": {"device": "NVIDIA H200"}}, "demo": {"status": "skipped"}}
    (tmp_path / "gpu_x.json").write_text(json.dumps({"rows": rows, "stages": ended}))
    text = queue.queue(tmp_path)
    assert f"| window_attention | {stages.ops()[0].WHAT} | NVIDIA H200: 1 of 2 rows |" in text
    assert "matrix rate | NVIDIA H200: done |" in text and "on CUDA | NVIDIA H200: skipped |" in text


def test_the_clocks_of_all_kernels_of_a_case_add_up_and_no_budget_predicts_nothing(tmp_path):
    path = tmp_path / "budget.json"
    assert queue.read_budget(path) == {}
    rows = [{"case": "a", "arch": 90, "clocks": 400}, {"case": "a", "arch": 90, "clocks": 50.5}]
    path.write_text(json.dumps({"rows": [*rows, {"case": "a", "arch": 80, "clocks": 1}]}))
    assert queue.read_budget(path) == {("a", 90): 450.5, ("a", 80): 1.0}
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match=r"budget\.json must hold a static budget"):
        queue.read_budget(path)


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    out = tmp_path / "QUEUE.md"
    assert queue.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == queue.queue(tmp_path)
    assert f"wrote {out}" in capsys.readouterr().out
