"""Each kind of goal, met, short, failed and not measured, on rows with the entries that the harness writes."""

import json

import pytest

from bench.harness import OUTCOME
from bench.report import goals
from bench.report.anchors import Anchors, Goal, Peak, load_anchors
from bench.report.goals import MET, NOT_MEASURED, SHORT, judge, judge_all, matches, outcome
from bench.report.rows import Device

ANCHORS = Anchors({}, [], [Peak("H200", 1e15, "https://here")], [])


def row(competitor="ours (triton)", seconds=1e-3, status="timed", **entries):
    """A row of window attention at 7x7 on an H200, which copies 1 TB/s and multiplies at 500 TFLOP/s."""
    made = {
        "op": "window_attention", "shape": "swin", "sizes": {"window": 7, "head_dim": 32}, "dtype": "bf16",
        "mode": "forward", **dict.fromkeys(OUTCOME), "bytes_moved": 8e8, "flops": 1e11, "num_sms": 100,
        "copy_bytes_per_second": 1e12, "matrix_flops_per_second": 5e14, "device": "NVIDIA H200",
    }  # fmt: skip
    if status == "timed":
        made |= {"median": seconds, "q20": seconds, "q80": seconds, "copy_ratio": 8e8 / seconds / 1e12}
    made |= {"competitor": competitor, "status": status, **entries}
    key = "|".join(str(made[name]) for name in ("op", "shape", "dtype", "mode", "competitor"))
    return {"key": key, **made}


def judged(goal, *rows, device="NVIDIA H200"):
    return judge(goal, Device(device, list(rows)), ANCHORS)


def goal(metric, mode="forward", op="window_attention", **entries):
    return Goal("a goal", op, metric, mode, **entries)


def test_without_any_row_every_goal_is_not_measured_yet():
    anchors = load_anchors()
    verdicts = judge_all([], anchors)
    assert [verdict.goal for verdict in verdicts] == anchors.goals
    assert {outcome(verdict) for verdict in verdicts} == {NOT_MEASURED}


def test_the_worst_row_decides():
    wanted = goal("copy_ratio", at_least=0.75)
    met = judged(wanted, row(), row(shape="other", seconds=0.9e-3))
    assert (met.status, met.rows, met.row) == (MET, 2, "swin bf16")
    assert met.value == pytest.approx(0.8) and met.reached == pytest.approx(0.8 / 0.75)
    short = judged(wanted, row(), row(shape="slow", seconds=2e-3))
    assert (short.status, short.row) == (SHORT, "slow bf16")
    assert outcome(short) == "short: 40.0% (worst of 2 rows, slow bf16), 0.53 of the goal"


def test_only_rows_of_the_goal_count():
    wanted = goal("copy_ratio", dtype="bf16", where={"window": 7}, at_least=0.75)
    for other in (
        {"op": "layer_norm"}, {"mode": "both"}, {"dtype": "fp16"}, {"sizes": {"window": 12}}, {"sizes": {}},
        {"competitor": "eager"}, {"competitor": "ours (torch)"}, {"status": "missing"},
    ):  # fmt: skip
        assert judged(wanted, row(**other)).status == NOT_MEASURED, other


@pytest.mark.parametrize(
    ("device", "on", "status"),
    [
        ("GPU", "NVIDIA H200", MET),
        ("GPU", "CPU, AVX512", NOT_MEASURED),
        ("H200", "NVIDIA H200", MET),
        ("H200", "NVIDIA A100", NOT_MEASURED),
        (None, "CPU, AVX512", MET),
    ],
)
def test_a_goal_may_be_for_some_devices(device, on, status):
    assert judged(goal("milliseconds", device=device, at_most=2), row(), device=on).status == status


def test_a_failed_row_of_ours_is_no_met_goal():
    wanted = goal("copy_ratio", at_least=0.5)
    failed = row(shape="large", status="error", reason="out of memory")
    both = judged(wanted, row(), failed)
    assert both.status == SHORT and both.reached > 1
    assert outcome(both).endswith("; 1 row of ours without a time (large bf16: error)")
    assert outcome(judged(wanted, failed)) == "short: 1 row of ours without a time (large bf16: error)"
    # The largest batch is where memory ends.
    assert judged(goal("batch", of="best", at_least=5), row(sizes={"batch": 8}), failed).status == MET


def test_a_speedup_is_against_the_best_of_the_others():
    rows = [
        row(), row("ours (torch)", 0.1e-3), row("eager", 6e-3), row("torch.compile", 4e-3),
        row("torch.compile max-autotune", 3e-3), row("sdpa + mask", 2e-3), row("flex_attention", status="missing"),
    ]  # fmt: skip
    found = [judged(goal("speedup", against=name, at_least=1), *rows) for name in ("best", "eager", "torch.compile")]
    assert [verdict.value for verdict in found] == pytest.approx([2, 6, 3])
    assert judged(goal("speedup", against="best", at_least=1), *rows[:2]).status == NOT_MEASURED


def test_the_roofline_takes_the_longest_floor():
    wanted = goal("roofline", at_least=0.5)
    assert judged(wanted, row()).value == pytest.approx(0.8), "memory: 0.8 ms of 1 ms"
    assert judged(wanted, row(flops=4.5e11)).value == pytest.approx(0.9), "products: 0.9 ms"
    assert judged(wanted, row(flops=0, dtype="fp32")).value == pytest.approx(0.8), "nothing but memory"
    assert judged(wanted, row(dtype="fp32")).status == NOT_MEASURED, "the rate of products is of bfloat16"
    # 4.5e11 FLOPs are two products of 2 x 32 for each exponential: 3.5e9 of them at 1,600 a clock of 1 GHz.
    clocked = row(flops=4.5e11, sm_clock_mhz=1000, seconds=4e-3)
    assert judged(wanted, clocked).value == pytest.approx(4.5e11 / (4 * 32) / 1.6e12 / 4e-3)
    twice = row(flops=4.5e11, sm_clock_mhz=1000, seconds=4e-3, mode="both")
    exps = 2 * 4.5e11 / (12 * 32)
    assert judged(goal("roofline", "both", at_least=0.1), twice).value == pytest.approx(exps / 1.6e12 / 4e-3)


def test_mfu_needs_a_stated_peak():
    wanted = goal("mfu", at_least=0.05)
    assert judged(wanted, row()).value == pytest.approx(0.1)
    assert judged(wanted, row(device="NVIDIA B300"), device="NVIDIA B300").status == NOT_MEASURED


def test_memory_is_set_beside_what_is_allowed():
    wanted = goal("memory", op="contrastive_loss", bytes_per_value=12, plus_bytes=2**27, at_most=1)
    sizes = {"batch": 65536, "dim": 512}
    allowed = 12 * 65536 * 512 + 2**27
    found = judged(wanted, row(op="contrastive_loss", sizes=sizes, peak_bytes=allowed * 2))
    assert (found.status, found.value, found.reached) == (SHORT, 2, 0.5)
    assert judged(wanted, row(op="contrastive_loss", sizes=sizes, peak_bytes=allowed)).status == MET
    assert judged(wanted, row(op="contrastive_loss", sizes=sizes)).status == NOT_MEASURED


def test_sizes_match_by_value_list_and_square():
    assert matches({"window": 7}, {"window": [7, 7]}) and not matches({"window": 7}, {"window": [8, 7]})
    assert matches({"model": ["a", "b"]}, {"model": "b"}) and not matches({"model": ["a", "b"]}, {"model": "c"})
    assert matches({}, {"window": 7}) and not matches({"window": 7}, {})


def test_every_metric_of_the_file_can_be_computed():
    for wanted in load_anchors().goals:
        where = {name: value[0] if isinstance(value, list) else value for name, value in wanted.where.items()}
        sizes = {"batch": 65536, "dim": 512, "head_dim": 32, **where}
        entries = {"op": wanted.op, "mode": wanted.mode, "dtype": wanted.dtype or "bf16", "sizes": sizes}
        rows = [row(**entries, peak_bytes=2**28), row("eager", 2e-3, **entries), row("torch.compile", 3e-3, **entries)]
        found = judge(wanted, Device("CPU, AVX512" if wanted.device == "CPU" else "NVIDIA H200", rows), load_anchors())
        assert found.status in (MET, SHORT) and found.value > 0, wanted.name


def test_the_command_prints_every_goal(tmp_path, capsys):
    (tmp_path / "gpu_h200.json").write_text(json.dumps({"stages": {}, "rows": [row(seconds=0.9e-3)]}))
    assert goals.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"1 met, 0 short, {len(load_anchors().goals) - 1} not measured yet" in printed
    assert "88.9%" in printed
