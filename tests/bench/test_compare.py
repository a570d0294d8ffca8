"""Two runs compared: what is noise, what is a change, and what cannot be compared."""

import json
import random

import pytest

from bench.harness import OUTCOME
from bench.report import compare
from bench.report.compare import BROKEN, FASTER, GONE, NEW, SAME, SLOWER


def row(name="a", ms=1.0, spread=0.02, competitor="ours (triton)", status="timed", **entries):
    """A row with the entries that the harness writes; times in milliseconds."""
    made = {
        "key": f"op|{name}|bf16|forward|{competitor}", "op": "op", "shape": name, "sizes": {}, "dtype": "bf16",
        "mode": "forward", "competitor": competitor, **dict.fromkeys(OUTCOME), "status": status,
        "copy_bytes_per_second": 1e12, "matrix_flops_per_second": 1e14, "device": "NVIDIA H200",
    }  # fmt: skip
    if status == "timed":
        times = {"q20": ms * (1 - spread), "median": ms, "q80": ms * (1 + spread)}
        made |= {name: value * 1e-3 for name, value in times.items()}
    return {**made, **entries}


def changes(old, new, **options):
    return {change.key.split("|")[1]: change for change in compare.compare(old, new, **options)}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.0, 0.02), (1.2, 0.02), SLOWER),
        ((1.2, 0.02), (1.0, 0.02), FASTER),
        ((1.0, 0.02), (1.0, 0.02), SAME),
        ((1.0, 0.15), (1.2, 0.02), SAME),  # the spread of the old run reaches over the change
        ((1.0, 0.02), (1.2, 0.18), SAME),  # that of the new one
        ((1.2, 0.15), (1.0, 0.06), SAME),
        ((1.0, 0.001), (1.04, 0.001), SAME),  # clear, and too small to matter
        ((1.04, 0.001), (1.0, 0.001), SAME),
        ((1.0, 0.001), (1.06, 0.001), SLOWER),
    ],
)
def test_a_change_must_pass_both_spreads_and_the_least_ratio(old, new, verdict):
    found = changes([row("a", *old)], [row("a", *new)])["a"]
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(new[0] / old[0])


def test_ranges_that_meet_are_no_change():
    old = {"q20": 0.99e-3, "median": 1.00e-3, "q80": 1.10e-3}
    new = {"q20": 1.05e-3, "median": 1.12e-3, "q80": 1.13e-3}
    assert changes([row(**old)], [row(**new)])["a"].verdict == SAME
    assert changes([row(**new)], [row(**old)])["a"].verdict == SAME
    assert changes([row(**old)], [row(**{**new, "q20": 1.11e-3})])["a"].verdict == SLOWER


def test_the_least_ratio_is_settable_and_not_below_one():
    pair = [row("a", 1.0, 0.001)], [row("a", 1.06, 0.001)]
    assert changes(*pair, min_ratio=1.1)["a"].verdict == SAME
    for wrong in (0.9, float("nan")):
        with pytest.raises(ValueError, match="min_ratio must be at least 1"):
            compare.compare(*pair, min_ratio=wrong)


def test_repeats_of_one_run_are_the_same():
    draw = random.Random(0)
    for _ in range(200):
        a, b = (row("a", draw.gauss(1, 0.01), 0.03) for _ in range(2))
        assert changes([a], [b])["a"].verdict == SAME


def test_a_row_that_fails_now_is_broken_and_a_missing_competitor_is_not():
    old = [row("error"), row("wrong"), row("lost"), row("gone", competitor="xformers"), row("back", status="error")]
    new = [
        row("error", status="error"), row("wrong", status="wrong"), row("lost", status="missing"),
        row("gone", competitor="xformers", status="missing"), row("back"),
    ]  # fmt: skip
    found = {name: change.verdict for name, change in changes(old, new).items()}
    assert found == {"error": BROKEN, "wrong": BROKEN, "lost": BROKEN, "gone": GONE, "back": NEW}


def test_the_slowest_stands_first_and_rows_of_one_file_last():
    old = [row("fast", 2.0), row("same"), row("slow"), row("slower"), row("dropped"), row("broken")]
    new = [row("added"), row("slow", 1.5), row("slower", 3.0), row("same"), row("fast"), row("broken", status="error")]
    found = changes(old, new)
    assert list(found) == ["broken", "slower", "slow", "same", "fast", "dropped", "added"]
    assert (found["dropped"].verdict, found["added"].verdict) == (GONE, NEW)


@pytest.fixture
def files(tmp_path):
    """Write two runs and return the command's exit code with what was printed."""

    def run(old, new, *options, capsys):
        paths = []
        for name, rows in (("old", old), ("new", new)):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"stages": {}, "rows": rows}), encoding="utf-8")
            paths.append(str(path))
        code = compare.main([*paths, *options])
        return code, capsys.readouterr()

    return run


def test_the_exit_code_is_one_on_a_regression_alone(files, capsys):
    assert files([row()], [row()], capsys=capsys)[0] == 0
    assert files([row()], [row(ms=0.5)], capsys=capsys)[0] == 0
    code, shown = files([row()], [row(ms=2.0)], capsys=capsys)
    assert code == 1
    assert "2.000" in shown.out and "1 slower" in shown.out
    assert files([row()], [row(status="error")], capsys=capsys)[0] == 1
    assert files([row(), row("b")], [row()], capsys=capsys)[0] == 0


def test_competitors_can_be_left_out(files, capsys):
    old, new = [row(), row(competitor="eager")], [row(), row(ms=2.0, competitor="eager")]
    assert files(old, new, capsys=capsys)[0] == 1
    assert files(old, new, "--ours", capsys=capsys)[0] == 0
    code, shown = files(old[1:], new[1:], "--ours", capsys=capsys)
    assert code == 2 and "both runs must hold rows to compare, got 0 and 0" in shown.err


def test_rows_that_are_the_same_are_shown_when_asked_for(files, capsys):
    assert "op a bf16" not in files([row()], [row()], capsys=capsys)[1].out
    assert "op a bf16" in files([row()], [row()], "--all", capsys=capsys)[1].out.replace("\n", " ")


def test_different_devices_are_refused(files, capsys):
    code, shown = files([row()], [row(device="NVIDIA A100")], capsys=capsys)
    assert code == 2 and not shown.out
    assert "both runs must be of one device, got NVIDIA H200 and NVIDIA A100" in shown.err


def test_a_file_without_rows_is_refused(files, capsys, tmp_path):
    code, shown = files([], [row()], capsys=capsys)
    assert code == 2 and "old.json must hold rows of the benchmarks" in shown.err
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert compare.main([str(tmp_path / "broken.json"), str(tmp_path / "new.json")]) == 2
    assert compare.main([str(tmp_path / "absent.json"), str(tmp_path / "new.json")]) == 2


def test_a_device_that_was_not_the_same_is_told(files, capsys):
    slow = {"copy_bytes_per_second": 0.8e12}
    shown = files([row()], [row(ms=1.25, **slow)], capsys=capsys)[1].out
    assert "note: the copy bandwidth of the new run is 0.800 of the old one's" in shown
    assert "rate of products" not in shown
