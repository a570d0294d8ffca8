"""Warming up: what was compiled and what was warm is told apart, and a machine without a GPU is told so."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from florence_fast import warmup
from florence_fast.cli import main
from florence_fast.cli.warmup import kernels_table, summary

# Compiles the same kernel twice for a GPU that is not here, and forgets in between what the process has in memory.
CHILD = """
import json
from bench.budget.aot import launch, recording
from bench.budget.cases import CASES
from florence_fast.kernels import l2_normalize
from florence_fast.warmup import compilations

case = next(case for case in CASES if case.name == "l2_normalize C96 bf16 forward")
runs = []
for _ in range(2):
    l2_normalize._l2_normalize_fwd_kernel.device_caches.clear()
    with recording(90, set(case.kernels)), compilations() as found:
        launch(case, 90)
        launch(case, 90)
    runs.append([[kernel.name, kernel.seconds, kernel.warm] for kernel in found])
print(json.dumps(runs))
"""


def test_a_kernel_is_compiled_once_and_then_read_from_the_cache_on_disk(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, text=True
    ).stdout
    ((first, compiling, cold),), ((second, reading, warm),) = json.loads(shown)
    assert first == second == "_l2_normalize_fwd_kernel"
    assert (cold, warm) == (False, True) and compiling > reading > 0


def test_listening_ends_with_the_run_and_an_earlier_listener_hears_too(monkeypatch):
    import triton

    heard = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: heard.append(told["cache_hit"]))
    earlier = triton.knobs.compilation.listener
    with pytest.raises(ZeroDivisionError), warmup.compilations() as found:
        triton.knobs.compilation.listener(
            src=SimpleNamespace(name="k"), times=SimpleNamespace(total=2_500_000), cache_hit=True, metadata={}
        )
        raise ZeroDivisionError
    assert found == [warmup.Compiled("k", 2.5, True)] and heard == [True]
    assert triton.knobs.compilation.listener is earlier


@pytest.mark.parametrize(("model", "size"), [("florence_nano", 32), ("coswin_tiny", 32)])
@pytest.mark.parametrize("train", [False, True])
def test_the_model_runs_twice_and_backward_if_asked(model, size, train, monkeypatch):
    seen = []
    real = warmup.create_model

    def remembered(*args, **kwargs):
        net = real(*args, **kwargs)
        net.register_forward_hook(lambda net, args, out: seen.append((args[0].shape, torch.is_grad_enabled())))
        parameter = next(net.parameters())
        parameter.register_hook(lambda grad: seen.append("gradient"))
        return net

    monkeypatch.setattr(warmup, "create_model", remembered)
    found = warmup.warm_up(model, "cpu", img_size=size, batch_size=2, train=train)
    calls = [entry for entry in seen if entry != "gradient"]
    assert calls == [((2, 3, size, size), train)] * 2
    assert seen.count("gradient") == (2 if train else 0)
    assert found["first"] > 0 and found["second"] > 0 and found["kernels"] == []


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown precision 'bf61'.*did you mean 'bf16'"):
        warmup.warm_up("florence_nano", "cpu", precision="bf61")
    with pytest.raises(ValueError, match="did you mean 'florence_nano'"):
        warmup.warm_up("florence_nanoo", "cpu")


def test_the_command_says_that_there_is_nothing_to_compile_for_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["warmup", "--model", "coswin_tiny"]) == 0
    assert capsys.readouterr().out.startswith("Nothing to compile ahead: kernels are compiled for GPUs")
    assert main(["warmup", "--dtype", "bf61"]) == 2
    assert "did you mean 'bf16'" in capsys.readouterr().err


def test_the_command_passes_its_flags_on_and_counts_what_was_warm(capsys, monkeypatch):
    asked = []
    rows = [{"name": "a", "seconds": s, "warm": w} for s, w in ((1.5, False), (0.25, True))]
    rows.append({"name": "b", "seconds": 2.0, "warm": False})
    answer = {"kernels": rows, "first": 9.0, "second": 0.125}
    monkeypatch.setattr(warmup, "warm_up", lambda *args, **flags: asked.append((args, flags)) or answer)
    monkeypatch.setattr("florence_fast.cli.warmup.pick_device", lambda name: name)
    words = ["--device", "cuda", "--model", "coswin_tiny", "--dtype", "bf16", "--img-size", "224", "--batch", "4"]
    assert main(["warmup", *words, "--train"]) == 0
    flags = {"precision": "bf16", "img_size": 224, "batch_size": 4, "train": True}
    assert asked == [(("coswin_tiny", "cuda"), flags)]
    shown = capsys.readouterr().out
    assert "2 kernels compiled in 3.5 s, 1 were warm; first run 9.00 s, second 0.125 s" in shown
    table = kernels_table(rows)
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b"], ["2", "1"], ["1", "1"], ["1", "0"], ["1.75", "2.00"]
    ]  # fmt: skip
    assert summary(answer | {"kernels": rows[1:2]}).startswith("all 1 kernels were warm")
    assert summary(answer | {"kernels": []}).startswith("no kernel of ours ran")
    assert main(["warmup", "--device", "cuda", "--model", "coswin_tinyy"]) == 2
    assert len(asked) == 1
