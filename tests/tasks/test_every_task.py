"""What every task promises: it learns, resumes to the bit, is the same on several processes, and survives faults."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from florence_fast.tasks import TASKS
from florence_fast.train.config import Stage
from tests.tasks.tiny import BUILD, SETTINGS, STAGES, tiny_trainer, write_images
from tests.train.processes import NUM_PROCESSES, Processes
from tests.train.tiny_run import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
every_task = pytest.mark.parametrize("name", TASKS)
CHANCE = {"drop_path": 0.2, "augment": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of eight classes."""
    return write_images(tmp_path_factory.mktemp("images") / "classes")


def _records(out_dir: Path) -> list[dict[str, Any]]:
    """Return what every step must agree on to the bit: all that is logged but times and evaluations."""
    lines = (out_dir / "checkpoints" / "results.jsonl").read_text().splitlines()
    times = ("seconds", "data_time", "batch_time", "samples_per_second")
    steps = [record for record in map(json.loads, lines) if "last_loss" in record]
    return [{key: value for key, value in record.items() if key not in times} for record in steps]


def test_every_task_is_tested_and_named_as_its_key() -> None:
    assert BUILD.keys() == TASKS.keys()
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}


@every_task
def test_it_overfits_eight_samples(name: str, images: Path, tmp_path: Path) -> None:
    settings = {"stages": (Stage(70, 16),), "lr": 1e-2, "ema_decay": None}
    trainer = tiny_trainer(name, images, tmp_path, **settings, save_every_steps=None)
    trainer.run()
    first, *_, last = (record["loss"] for record in _records(tmp_path))
    assert last < 0.05 * first


@every_task
def test_killed_and_resumed_it_is_the_whole_run_to_the_bit(name: str, images: Path, tmp_path: Path) -> None:
    """The checkpoint of step 4 lies at the border of stages; the kill comes after step 5."""
    command = [sys.executable, "-m", "tests.tasks.tiny", name, str(images), str(tmp_path / "killed"), "5"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = tiny_trainer(name, images, tmp_path / "whole", **CHANCE)
    whole.run()
    resumed = tiny_trainer(name, images, tmp_path / "killed", **CHANCE)
    assert resumed.run(resume="latest")["step"] == sum(stage.steps for stage in STAGES)
    assert (tmp_path / "killed" / "out.log").read_text().count("resumed from") == 1
    assert _records(tmp_path / "killed") == _records(tmp_path / "whole")
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], weight), key
        assert torch.equal(resumed.state.ema.average.get(key, weight), whole.state.ema.average.get(key, weight)), key


def train(group: dist.ProcessGroup, name: str, images: Path, out_dir: Path) -> dict[str, Tensor]:
    """Train this rank's part of every batch; return the weights."""
    return _trained(name, images, out_dir, 8 // NUM_PROCESSES)


def _trained(name: str, images: Path, out_dir: Path, batch_size: int) -> dict[str, Tensor]:
    stages = tuple(Stage(3, stage.image_size, window_size=stage.window_size) for stage in STAGES)
    trainer = tiny_trainer(name, images, out_dir, stages=stages, batch_size=batch_size)
    trainer.run()
    return trainer.model.state_dict()


@every_task
def test_a_nan_step_is_skipped_and_named(
    name: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(name, images, tmp_path, stages=(Stage(3, 16),))
    task, weights = trainer.task, {}

    def damaged(batch: Any, stage: Stage, step: int, *others: Any) -> Tensor:
        loss = type(task).backward(task, batch, stage, step, *others)
        weights[step] = [parameter.detach().clone() for parameter in task.model.parameters()]
        return loss * torch.nan if step == 1 else loss

    task.backward = damaged
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert (result["skipped_steps"], result["step"]) == (1, 3)
    assert "step 1 skipped: the loss is nan" in caplog.text
    assert str(images) in caplog.text and ".png)" in caplog.text, "the samples of the step are named"
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))


@every_task
def test_bad_samples_are_counted_named_and_replaced(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path / "classes", broken=True)
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(name, folder, tmp_path / "run", stages=(Stage(3, 16),), batch_size=9)
        result = trainer.run()
    assert trainer.task.epoch_size == 9
    assert result["bad_samples"] == 3 and result["skipped_steps"] == 0
    assert "broken.png" in caplog.text


@every_task
def test_its_weights_file_says_what_it_is(name: str, images: Path, tmp_path: Path) -> None:
    result = tiny_trainer(name, images, tmp_path, stages=(Stage(1, 16),), warmup=0).run()
    with safe_open(Path(result["checkpoint"]).with_suffix(".safetensors"), framework="pt") as file:
        assert file.metadata()["florence_fast_task"] == name


@every_task
def test_it_logs_and_saves_no_more_than_json(name: str, images: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(name, images, tmp_path, stages=(Stage(1, 16),), warmup=0)
    assert json.loads(json.dumps(trainer.settings)) == trainer.settings
    assert trainer.settings["task"]["name"] == name
    assert TASKS[name].settings.from_dict(trainer.task.config.to_dict()) == trainer.task.config
    assert trainer.settings["lr"] == SETTINGS["lr"] and trainer.data


@every_task
@pytest.mark.dist
def test_several_processes_have_the_losses_of_one(
    name: str, processes: Processes, images: Path, tmp_path: Path
) -> None:
    answers = processes.run(train, NUM_PROCESSES, name, images, tmp_path / "four")
    weights = _trained(name, images, tmp_path / "one", 8)
    for one, four in zip(_records(tmp_path / "one"), _records(tmp_path / "four"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-3), f"step {one['step']}"
        assert four["position"] == one["position"]
    for key, weight in weights.items():
        assert all(torch.equal(answer[key], answers[0][key]) for answer in answers), key
        torch.testing.assert_close(answers[0][key], weight, rtol=1e-2, atol=1e-3, msg=key)
