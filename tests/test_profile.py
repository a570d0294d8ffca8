"""``florence-fast profile``: what it measures adds up, what it writes can be read, and Nsight's commands are right."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image
from torch.autograd import DeviceType

from florence_fast.cli import app, main
from florence_fast.profile import Workload, make_step
from florence_fast.profile.summary import kernel_rows, op_rows, range_rows, summarise
from tests.test_ranges import Nvtx

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--batch-size", "2", "--steps", "2", "--warmup", "1"]


def run(tmp_path: Path, *args: str) -> dict:
    """Run the command on the CPU and return what it wrote."""
    assert main(["profile", *SMALL, "--out", str(tmp_path), *args]) == 0
    return json.loads((tmp_path / "summary.json").read_text())


def named(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    assert main(["profile", *args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_forward_pass_is_divided_into_ranges_and_ops(tmp_path, capsys):
    found = run(tmp_path, "--trace", str(tmp_path / "traces" / "trace.json"), "--top", "40")
    rows = named(found["ranges"])
    assert {"ff.step", "ff.image.stem", "ff.image.stage1", "ff.text.blocks", "ff.op.window_attention"} <= set(rows)
    assert rows["ff.op.window_attention"]["calls"] == 6 and rows["ff.step"]["calls"] == 1
    assert not [name for name in rows if name.endswith("_backward")]
    assert rows["ff.step"]["share"] == 1 and rows["ff.step"]["total_ms"] == found["whole_ms"] > 0
    assert sum(row["self_ms"] for row in rows.values()) == pytest.approx(found["whole_ms"])
    assert all(0 <= row["self_ms"] <= row["total_ms"] for row in rows.values())
    ops = named(found["ops"])
    # The rest is Python between the ops, most of the time of so small a model on a busy machine.
    assert 0.05 < sum(row["self_ms"] for row in ops.values()) / found["whole_ms"] < 1.1
    for row in (*rows.values(), *ops.values()):  # one meaning in every table
        assert row["share"] == pytest.approx(row["total_ms"] / found["whole_ms"])
    (product,) = {"aten::addmm", "mkldnn::_linear_pointwise"} & set(ops)
    assert not [name for name in ops if name.startswith("ff.")] and found["kernels"] == []
    assert found["workload"]["model"] == "florence_nano" and found["steps"] == 2 and found["time"] == "cpu"
    assert all(0 < value < 1e5 for value in found["step_ms"].values())
    assert found["torch"] == torch.__version__ and found["device_type"] == "cpu"
    trace = json.loads((tmp_path / "traces" / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("name", "").startswith("ff.")]
    assert {event["name"] for event in events} == set(rows)
    assert len([event for event in events if event["name"] == "ff.step"]) == 2
    with Image.open(tmp_path / "ranges.png") as image:
        assert image.width > 400 and image.convert("L").getextrema()[0] < 128
    shown = capsys.readouterr().out
    assert "ff.op.window_attention" in shown and product in shown and "images/s" in shown


def test_a_training_step_has_the_backward_and_the_phases_of_the_cache(tmp_path):
    whole = named(run(tmp_path, "--train")["ranges"])
    assert {"ff.train.gradients", "ff.train.optimizer", "ff.op.window_attention_backward"} <= set(whole)
    assert {"ff.op.contrastive_loss", "ff.op.contrastive_loss_backward"} <= set(whole)
    assert whole["ff.op.window_attention_backward"]["calls"] == 6
    cached = named(run(tmp_path, "--train", "--micro-batch-size", "1")["ranges"])
    assert cached["ff.grad_cache.forward"]["calls"] == 4 and cached["ff.grad_cache.backward"]["calls"] == 2
    assert cached["ff.op.window_attention"]["calls"] == 24


@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_an_image_tower_in_low_precision(tmp_path, precision):
    found = run(tmp_path, "--model", "coswin_nano", "--image-size", "32", "--precision", precision)
    names = set(named(found["ranges"]))
    assert "ff.image.stage3" in names and not [name for name in names if name.startswith("ff.text.")]
    assert found["workload"]["image_size"] == 32


def test_the_steps_do_what_they_are_named_after():
    model_output = make_step(Workload("florence_nano", 3, 32), "cpu")()
    assert [tuple(x.shape) for x in model_output] == [(3, 256), (3, 256), ()]
    assert not model_output[0].requires_grad
    logits = make_step(Workload("coswin_nano", 3, 32, "bf16"), "cpu")()
    assert logits.shape == (3, 384) and logits.dtype == torch.bfloat16
    step = make_step(Workload("florence_nano", 4, 32, train=True), "cpu")
    first, *_, last = [float(step()) for _ in range(12)]
    assert last < first - 0.05, f"twelve steps on one batch: {first} -> {last}"
    (cached,) = {float(make_step(Workload("florence_nano", 4, 32, train=True, micro_batch_size=2), "cpu")())}
    assert abs(cached - first) < 0.2, "both start from the same weights and batch; drop path draws other masks"


def test_refusals_are_one_line(capsys, monkeypatch):
    assert "did you mean 'florence_nano'" in refused(capsys, "--model", "florence_nanoo")
    assert "dual encoder" in refused(capsys, "--model", "coswin_nano", "--train")
    assert "micro_batch_size" in refused(capsys, "--micro-batch-size", "2")
    assert "did you mean 'amp_bf16'" in refused(capsys, "--precision", "amp_bf61")
    assert "'abacus'" in refused(capsys, "--device", "abacus")
    assert "give one of them" in refused(capsys, "--nsys", "--ncu", "x")
    assert "not at 'cpu'" in refused(capsys, "--nsys", "--device", "cpu")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "florence_fast[profile]" in refused(capsys, "--bare", "--device", "cpu")


def test_bare_runs_every_step_with_nvtx_ranges(capsys, monkeypatch):
    nvtx = Nvtx()
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    assert main(["profile", *SMALL, "--bare"]) == 0
    assert [call[1] for call in nvtx.calls if call[0] == "push"].count("ff.step") == 3
    assert "ms a step, with NVTX ranges" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_the_commands_of_nsight_are_printed_and_run_where_they_can(tool, tmp_path, monkeypatch, capsys):
    args = ["profile", "--model", "florence_tiny", "--batch-size", "4", "--image-size", "96", "--train", "--out"]
    args += [str(tmp_path / "out"), *(["--nsys"] if tool == "nsys" else ["--ncu", "_window_attention_.*"])]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(args) == 0
    line, note = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[0] == tool and f"{tool} is not installed here" in note and not (tmp_path / "out").exists()
    start = words.index("-m")
    assert words[start - 1 : start + 3] == [sys.executable, "-m", "florence_fast", "profile"]
    inner = parse(words[start + 3 :])
    wanted = {"model": "florence_tiny", "batch_size": 4, "image_size": 96, "train": True, "bare": True, "steps": 5}
    assert {name: inner[name] for name in wanted} == wanted and inner["device"] == "cuda"
    if tool == "nsys":
        assert words[1] == "profile" and "--capture-range=cudaProfilerApi" in words
        assert f"--output={tmp_path / 'out' / 'nsys'}" in words and "--trace=cuda,nvtx,osrt,cublas,cudnn" in words
    else:
        assert (
            words[1:3] == ["--set", "full"] and words[words.index("--kernel-name") + 1] == "regex:_window_attention_.*"
        )
        assert words[words.index("--profile-from-start") + 1] == "off"

    stand_in = f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv, open({str(tmp_path / 'seen')!r}, 'w'))\n"
    (tmp_path / tool).write_text(stand_in + "sys.exit(3)\n")
    os.chmod(tmp_path / tool, 0o755)
    assert main(args) == 3
    assert json.loads((tmp_path / "seen").read_text())[1:] == words[1:] and (tmp_path / "out").is_dir()


def parse(args: list[str]) -> dict:
    """What the command would be given for these words."""
    command = typer.main.get_command(app).commands["profile"]
    return command.make_context("profile", list(args)).params


def test_the_guide_gives_commands_that_there_are():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "profiling.md").read_text(), re.DOTALL))
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.strip()]
    ours = [words[2:] for words in commands if words[:2] == ["florence-fast", "profile"]]
    assert len(ours) >= 6
    kernels = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    for words in ours:
        given = parse(words)
        assert given["ncu"] is None or f"def {given['ncu']}(" in kernels
    budget = next(words for words in commands if words[1:3] == ["-m", "bench.budget"])
    cases = {row["case"] for row in json.loads((ROOT / "bench" / "results" / "budget.json").read_text())["rows"]}
    assert budget[budget.index("--case") + 1] in cases


def event(name: str, start: float, end: float, parent=None, kernels=(), device=False, annotation=False):
    """An event as torch.profiler gives it, put below its parent."""
    made = SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=parent,
        cpu_children=[],
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        device_type=DeviceType.CUDA if device else DeviceType.CPU,
        is_user_annotation=annotation,
    )
    if parent is not None:
        parent.cpu_children.append(made)
    return made


def test_on_a_gpu_a_range_has_the_time_of_the_kernels_launched_in_it():
    step = event("ff.step", 0, 500, annotation=True)
    stage = event("ff.image.stage0", 10, 60, step, [("ff.image.stage0", 9999)], annotation=True)
    custom = event("florence_fast::mlp", 12, 50, stage)
    op = event("ff.op.mlp", 13, 49, custom, annotation=True)
    addmm = event("aten::addmm", 14, 20, op, [("gemm", 300), ("gelu", 100)])
    other = event("aten::add", 50, 55, stage, [("add", 600)])
    outside = event("aten::copy_", 400, 410, step, [("copy", 1000)])
    gpu = [event("gemm", 100, 400, device=True), event("gelu", 400, 500, device=True)]
    gpu += [event("add", 500, 1100, device=True), event("copy", 1100, 2100, device=True)]
    mirrored = event("ff.image.stage0", 100, 1100, device=True, annotation=True)
    events = [step, stage, custom, op, addmm, other, outside, *gpu, mirrored]

    def average(key: str, kind: DeviceType, own: float, total: float) -> SimpleNamespace:
        times = {"self_device_time_total": own, "device_time_total": total}
        return SimpleNamespace(key=key, count=4, device_type=kind, is_user_annotation=False, **times)

    averages = [average("aten::addmm", DeviceType.CPU, 400, 400), average("gemm", DeviceType.CUDA, 300, 300)]
    averages += [average("florence_fast::mlp", DeviceType.CPU, 0, 400)]
    profiler = SimpleNamespace(events=lambda: events, key_averages=lambda: averages)
    found = summarise(profiler, 2, device=True)
    assert found["whole_ms"] == 1.0 and found["time"] == "kernels"
    rows = [(r["name"], r["calls"], r["total_ms"], r["self_ms"], r["share"]) for r in found["ranges"]]
    assert rows == [
        ("ff.step", 0.5, 1.0, 0.5, 1.0),
        ("ff.image.stage0", 0.5, 0.5, 0.3, 0.5),
        ("ff.op.mlp", 0.5, 0.2, 0.2, 0.2),
    ]
    assert [(r["name"], r["self_ms"], r["calls"]) for r in found["ops"]] == [("aten::addmm", 0.2, 2)]
    assert [(r["name"], r["total_ms"]) for r in found["kernels"]] == [
        ("copy", 0.5),
        ("add", 0.3),
        ("gemm", 0.15),
        ("gelu", 0.05),
    ]


def test_nothing_measured_is_no_division_by_zero():
    empty = [range_rows([], 0, 1, device=False), op_rows([], 0, 1, device=True), kernel_rows([], 0, 1)]
    assert empty == [[], [], []]
    assert range_rows([event("ff.step", 5, 5)], 0, 1, device=False)[0]["share"] == 0
