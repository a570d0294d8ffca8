"""``florence-fast verify``: it covers every op, tells a wrong backend from a right one, and its exit code says so."""

import json

import pytest
import torch

from florence_fast import native, ops, verify
from florence_fast.cli import verify as command
from florence_fast.ops import OPS
from florence_fast.ops.window_attention import torch as window_attention_torch
from florence_fast.ops.window_attention.cases import SUBJECT
from florence_fast.ops.window_attention.cases import setup as draw_windows
from florence_fast.verify.compare import CEILINGS, Judgement, joined, judge, relative_error


def run(capsys, *args: str) -> tuple[int, str]:
    """Run the command as the command line does, alone, and return its exit code and what it printed."""
    import typer

    app = typer.Typer(add_completion=False)
    app.command("verify")(command.command)
    code = typer.main.get_command(app).main(list(args), prog_name="verify", standalone_mode=False)
    return code or 0, capsys.readouterr().out


@pytest.fixture
def one_small_case(monkeypatch):
    """One of window attention's cases and no other op, on the library: enough to tell right from wrong."""
    small = verify.Subject("window_attention", SUBJECT.checked[1:2], SUBJECT.timed, SUBJECT.rivals)
    monkeypatch.setattr(verify, "subjects", lambda: {"window_attention": small})
    with ops.backend("torch"):
        yield


# They return indices, which are right or wrong: their tests compare box by box.
WITHOUT_ERRORS = {"nms", "batched_nms"}


def test_every_op_is_verified_and_has_its_plain_computation():
    assert set(verify.subjects()) == set(OPS) - WITHOUT_ERRORS
    for subject in verify.subjects().values():
        assert subject.checked and "eager" in subject.rivals and set(subject.timed) == {"cpu", "cuda"}


def test_every_op_passes_here_in_every_dtype(capsys, tmp_path):
    code, shown = run(capsys, "--device", "cpu", "--no-times", "--seed", "3", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and found["passed"], shown
    assert found["seeds"] == [3, 4, 5] and found["torch"] == torch.__version__ and found["times"] == []
    assert {(row["op"], row["dtype"]) for row in found["checks"]} == {
        (op, dtype) for op in verify.subjects() for dtype in verify.DTYPES
    }
    for row in found["checks"]:
        names = [result["name"] for result in row["results"]]
        assert names[0] == "out" and len(names) >= 2, "every gradient is compared"
        assert all(0 <= result["error"] <= result["limit"] for result in row["results"])
        assert any(result["error"] for result in row["results"]), "float32 sums of few numbers may be exact, not all"


def test_a_wrong_result_gives_exit_code_1(capsys, monkeypatch, one_small_case):
    right = window_attention_torch.window_attention_fwd

    def wrong(*args):
        out, kept = right(*args)
        return out * 1.05, kept

    monkeypatch.setattr(window_attention_torch, "window_attention_fwd", wrong)
    code, shown = run(capsys, "--device", "cpu", "--no-times")
    assert code == 1 and "3 of 3 checks are WRONG" in shown


def test_a_wrong_gradient_gives_exit_code_1(capsys, monkeypatch, one_small_case):
    right = window_attention_torch.window_attention_bwd

    def wrong(*args):
        dqkv, dtable, *others = right(*args)
        return dqkv, dtable * 1.05, *others

    monkeypatch.setattr(window_attention_torch, "window_attention_bwd", wrong)
    code, shown = run(capsys, "--device", "cpu", "--no-times")
    assert code == 1 and "WRONG" in shown and "rel_pos_bias_table" in shown


def test_an_error_is_a_failed_check(capsys, monkeypatch, one_small_case):
    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(window_attention_torch, "window_attention_fwd", broken)
    code, shown = run(capsys, "--device", "cpu", "--no-times")
    assert code == 1 and "WRONG: RuntimeError: no luck" in shown


def test_a_backend_that_can_run_nothing_verifies_nothing(capsys, monkeypatch, one_small_case):
    monkeypatch.setattr(native, "extension", lambda: None)
    with ops.backend("cpp"):
        code, shown = run(capsys, "--device", "cpu", "--no-times")
    assert code == 1
    assert "nothing could be run" in shown and "not run: backend 'cpp' cannot run window_attention" in " ".join(
        shown.split()
    )


def test_times_stand_beside_the_rivals(monkeypatch, capsys):
    timed = {"cpu": SUBJECT.checked[1]}
    small = verify.Subject("window_attention", (), timed, SUBJECT.rivals)
    with ops.backend("torch"):
        rows = verify.measure(small, "cpu", seed=0, seconds=0.01, compile=False)
    assert [(row["mode"], row["implementation"]) for row in rows] == [
        (mode, name) for mode in ("forward", "both") for name in ("ours (torch)", "eager", "sdpa")
    ]
    assert all(0 < row["q20"] <= row["median"] <= row["q80"] for row in rows)
    from rich.console import Console

    Console(width=120).print(command.times_table(rows))
    shown = capsys.readouterr().out
    assert all(f"{row['median'] * 1e3:.3g}" in shown for row in rows)


@pytest.mark.parametrize("case", SUBJECT.checked, ids=lambda case: case.name)
@pytest.mark.parametrize("rival", SUBJECT.rivals)
def test_rivals_of_window_attention_compute_the_same(case, rival):
    inputs = case.make(torch.float64, "cpu", 0)
    found = verify.results(SUBJECT.rivals[rival](inputs), inputs.tensors, inputs.grad_out)
    for name, exact in verify.exact_results("window_attention", inputs).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_equal_seeds_draw_equal_tensors():
    shape = window_shape()
    first, second, other = (draw_windows(shape, torch.float32, "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first.tensors["qkv"], second.tensors["qkv"])
    assert not torch.equal(first.tensors["qkv"], other.tensors["qkv"])


def window_shape():
    from florence_fast.ops.window_attention.cases import Shape

    return Shape(1, 6, 7, 1, window=3, shift=1, head_dim=16)


def test_the_limit_follows_the_plain_error_and_nan_never_passes():
    exact = {"out": torch.ones(100, dtype=torch.float64), "dx": torch.ones(100, dtype=torch.float64)}
    plain = {name: (x + 0.001).float() for name, x in exact.items()}

    def verdicts(offset: float) -> list[bool]:
        return [j.passed for j in judge({name: (x + offset).float() for name, x in exact.items()}, plain, exact)]

    assert verdicts(0.0019) == [True, True]
    assert verdicts(0.0025) == [False, True]
    assert verdicts(0.0031) == [False, False]
    assert verdicts(float("nan")) == [False, False]
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_an_absurd_plain_error_lets_nothing_absurd_pass(dtype):
    exact = {name: torch.ones(100, dtype=torch.float64) for name in ("out", "dx")}
    ceiling = CEILINGS[dtype]
    assert ceiling < 0.3

    def verdicts(error: float, plain_error: float) -> list[bool]:
        found, plain = ({name: (x + e).to(dtype) for name, x in exact.items()} for e in (error, plain_error))
        return [judgement.passed for judgement in judge(found, plain, exact)]

    assert verdicts(0.9 * ceiling, ceiling) == [True, True]
    assert verdicts(1.2 * ceiling, ceiling) == [False, False] == verdicts(1.0, 1.0)
    assert judge({}, {}, {}) == []


def test_a_gradient_in_float32_beside_a_result_in_bfloat16_is_held_to_that():
    exact = {"out": torch.ones(100, dtype=torch.float64), "dtable": torch.ones(100, dtype=torch.float64)}
    plain = {"out": exact["out"].bfloat16(), "dtable": exact["dtable"].float() + 0.02}
    assert [judgement.limit for judgement in judge(plain, plain, exact)] == pytest.approx([2**-8, 0.06], rel=0.1)


def test_seeds_are_joined_by_root_mean_square():
    (both,) = joined([[Judgement("out", 3.0, 1.0, 2.0)], [Judgement("out", 4.0, 1.0, 2.0)]])
    assert both.error == pytest.approx((12.5) ** 0.5) and (both.plain_error, both.limit) == (1.0, 2.0)
    (lost,) = joined([[Judgement("out", float("nan"), 1.0, 2.0)], [Judgement("out", 1.0, 1.0, 2.0)]])
    assert not lost.passed
