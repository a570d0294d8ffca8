"""A run that is killed, stopped or resumed anywhere has the losses of one that was left alone, to the bit.

Losses, gradient norms, temperatures and learning rates are compared as ``float.hex()``, from ``results.jsonl``.
"""

import json
import logging
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from florence_fast.train.checkpoint import CheckpointStore
from florence_fast.train.config import Stage
from florence_fast.train.resume import ResumeError
from tests.train.tiny_run import STAGES, losses, start_child, tiny_trainer, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL_STEPS = sum(stage.steps for stage in STAGES)
# Seconds are enough on a free machine; a busy one may give a child a hundredth of a core.
PATIENCE_SECONDS = 600


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, with a checkpoint of every step."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    tiny_trainer(pairs, out_dir, save_every_steps=1, keep_checkpoints=TOTAL_STEPS).run()
    assert list(losses(out_dir)) == list(range(1, TOTAL_STEPS + 1))
    return out_dir


def _wait_for_step(process: subprocess.Popen[str], out_dir: Path, step: int) -> None:
    """Return once the child has logged ``step``."""
    results = out_dir / "checkpoints" / "results.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not results.is_file() or results.read_text().count("\n") < step:
        assert process.poll() is None, f"the child ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline, f"the child did not reach step {step}"
        time.sleep(0.001)


def _result(process: subprocess.Popen[str]) -> dict[str, object]:
    """Wait for a child that has to end well, and return its last line."""
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def test_killed_at_a_random_step_and_resumed(pairs: Path, tmp_path: Path) -> None:
    """At two threads: with one, a sum in another order could not show."""
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    step, delay = draw.randrange(1, TOTAL_STEPS - 3), draw.uniform(0, 0.02)
    print(f"seed {seed}: SIGKILL {1000 * delay:.1f} ms after step {step}")
    undisturbed = start_child(pairs, tmp_path / "whole", threads=2)
    child = start_child(pairs, tmp_path / "killed", threads=2)
    _wait_for_step(child, tmp_path / "killed", step)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, f"seed {seed}: the child ended by itself"
    resumed = _result(start_child(pairs, tmp_path / "killed", "--resume", "latest", threads=2))
    assert resumed["status"] == _result(undisturbed)["status"] == "finished"
    assert len(losses(tmp_path / "whole")) == TOTAL_STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"seed {seed}, SIGKILL at step {step}"
    assert not list(tmp_path.rglob("*.tmp"))


def test_sigterm_saves_at_the_border_of_a_step_and_exits_cleanly(whole: Path, pairs: Path, tmp_path: Path) -> None:
    child = start_child(pairs, tmp_path, "--settings", '{"save_every_steps": null}')
    _wait_for_step(child, tmp_path, 2)
    child.terminate()
    result = _result(child)
    assert (result["status"], result["signal"]) == ("stopped", "SIGTERM")
    assert 2 <= result["step"] < TOTAL_STEPS
    assert Path(result["checkpoint"]).name == f"step_{result['step']}.pt"
    assert tiny_trainer(pairs, tmp_path).run(resume="latest")["step"] == TOTAL_STEPS
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="inside-an-epoch"),
        pytest.param(5, id="the-epoch-ends-inside-a-batch"),
        pytest.param(7, id="at-the-border-of-stages"),
        pytest.param(8, id="inside-the-second-stage"),
    ],
)
def test_resumed_from_the_checkpoint_of_a_step(whole: Path, pairs: Path, tmp_path: Path, step: int) -> None:
    torch.randn(7)
    trainer = tiny_trainer(pairs, tmp_path)
    result = trainer.run(resume=whole / "checkpoints" / f"step_{step}.pt")
    assert losses(tmp_path) == losses(whole, after=step)
    assert result["position"] == 7 * 32 + 5 * 36
    finished = torch.load(whole / "checkpoints" / f"step_{TOTAL_STEPS}.pt", weights_only=True)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, finished["model"][name]), name
    for name, average in trainer.state.ema.average.items():
        assert torch.equal(average, finished["ema"]["average"][name]), name


def test_an_interval_that_was_cut_is_averaged_whole(whole: Path, pairs: Path, tmp_path: Path) -> None:
    """The checkpoint of step 5 lies inside the interval of steps 5 to 8."""
    tiny_trainer(pairs, tmp_path / "whole", log_every_n_steps=4).run()
    settings = {"log_every_n_steps": 4, "save_every_steps": 5, "keep_checkpoints": 9}
    tiny_trainer(pairs, tmp_path / "cut", **settings).run()
    for later in ("step_10", "step_12"):
        (tmp_path / "cut" / "checkpoints" / f"{later}.pt").unlink()
    tiny_trainer(pairs, tmp_path / "cut", **settings).run(resume="latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    single = [float.fromhex(values.split()[0]) for values in losses(whole).values()]
    means = [float.fromhex(values.split()[0]) for values in losses(tmp_path / "cut").values()]
    assert means == pytest.approx([sum(single[start : start + 4]) / 4 for start in (0, 4, 8)], rel=1e-12)


def test_a_corrupt_checkpoint_is_named_and_an_earlier_one_resumed(
    whole: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(whole, out_dir)
    for step in (TOTAL_STEPS, TOTAL_STEPS - 1):
        path = out_dir / "checkpoints" / f"step_{step}.pt"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        tiny_trainer(pairs, out_dir).run(resume="latest")
    assert f"step_{TOTAL_STEPS}.pt is corrupt" in caplog.text
    assert f"step_{TOTAL_STEPS - 1}.pt is corrupt" in caplog.text
    assert f"resumed from {out_dir / 'checkpoints' / f'step_{TOTAL_STEPS - 2}.pt'}" in (out_dir / "out.log").read_text()
    assert losses(out_dir) == losses(whole)


def test_what_differs_from_the_checkpoint_is_named(
    whole: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.WARNING):
            tiny_trainer(pairs, tmp_path, lr=1e-3).run(resume=whole / "checkpoints" / f"step_{TOTAL_STEPS - 1}.pt")
    finally:
        torch.set_num_threads(1)
    assert "environment threads differs from the checkpoint's: 1, now 2" in caplog.text
    assert "setting lr differs from the checkpoint's: 0.003, now 0.001" in caplog.text


def test_latest_starts_where_nothing_is_and_a_new_run_refuses_where_something_is(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    one_step = {"stages": (Stage(steps=1, image_size=16),), "warmup": 0}
    assert tiny_trainer(pairs, tmp_path, **one_step).run(resume="latest")["step"] == 1
    with pytest.raises(FileExistsError, match=r"holds a run already \(step_1\.pt\)"):
        tiny_trainer(pairs, tmp_path, **one_step).run()
    with pytest.raises(FileNotFoundError, match=r"step_99\.pt"):
        tiny_trainer(pairs, tmp_path, **one_step).run(resume=tmp_path / "checkpoints" / "step_99.pt")


@pytest.mark.parametrize("step", [5, 8])
def test_a_checkpoint_from_before_tasks_is_resumed(
    whole: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    """Its settings lie side by side, those that came later are missing, and groups of the optimiser know no factor."""
    store = CheckpointStore(tmp_path / "old")
    state = store.load(whole / "checkpoints" / f"step_{step}.pt")
    task = state["config"].pop("task")
    assert task.pop("name") == "contrastive"
    state["config"] |= {name: value for name, value in task.items() if name not in ("augment", "lock_image")}
    for later in ("evaluate_every_steps", "lr_scheduler", "cooldown", "torchcompile", "wandb"):
        del state["config"][later]
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(pairs, tmp_path / "run", save_every_steps=1, keep_checkpoints=TOTAL_STEPS)
        trainer.run(resume=store.save(step, state))
    assert losses(tmp_path / "run") == losses(whole, after=step)
    assert "differs" not in caplog.text


def test_a_checkpoint_of_another_task_is_refused_in_one_line(whole: Path, pairs: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "other")
    state = store.load(whole / "checkpoints" / "step_5.pt")
    state["config"]["task"] = {"name": "classification", "label_smoothing": 0.1}
    with pytest.raises(ResumeError, match="it belongs to the task classification, and this run's is contrastive"):
        tiny_trainer(pairs, tmp_path / "run").run(resume=store.save(5, state))
