"""No step that was taken is lost, and no good checkpoint, whatever ends a run."""

import dataclasses
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from florence_fast.models import Florence
from florence_fast.tasks.images import plain_images
from florence_fast.train.config import Stage
from florence_fast.train.engine import Trainer, TrainingDivergedError
from florence_fast.train.resume import ResumeError
from florence_fast.train.run_lock import RunInUseError
from tests.train.tiny_run import STAGES, losses, tiny_model, tiny_trainer, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
TOTAL_STEPS = sum(stage.steps for stage in STAGES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=40)


def _one_stage(steps: int, **settings: Any) -> dict[str, Any]:
    return {"stages": (Stage(steps=steps, image_size=16),), "warmup": 0, "save_every_steps": None, **settings}


def _steps(out_dir: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (out_dir / "checkpoints").glob("step_*.pt"))


class Noisy:
    """An augmentation that draws from a generator and raises an error at one step, after drawing."""

    def __init__(self, error: Exception | None = None, step: int = -1) -> None:
        self.generator = np.random.default_rng(3)
        self.plain, self.error, self.step = plain_images(tiny_model().config), error, step

    def __call__(self, images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        noise = torch.from_numpy(self.generator.standard_normal((len(images), 1, 1, 1), dtype=np.float32))
        if step == self.step:
            raise self.error
        return self.plain(images, image_size, seed, step) + 0.1 * noise


@pytest.mark.parametrize("step", [pytest.param(5, id="inside-a-stage"), pytest.param(7, id="first-of-a-stage")])
def test_an_error_leaves_the_steps_before_it_and_the_run_goes_on_to_the_bit(
    pairs: Path, tmp_path: Path, step: int
) -> None:
    """Generators that the failed step drew from are as before it."""
    for name, augment in (("whole", Noisy()), ("failed", Noisy(MemoryError("no memory"), step))):
        settings = {"augment": augment, "generators": {"noise": augment.generator}, "save_every_steps": None}
        trainer = tiny_trainer(pairs, tmp_path / name, **settings)
        if name == "whole":
            trainer.run()
            continue
        with pytest.raises(MemoryError, match="no memory"):
            trainer.run()
    assert _steps(tmp_path / "failed") == [step]
    augment = Noisy()
    settings = {"augment": augment, "generators": {"noise": augment.generator}}
    tiny_trainer(pairs, tmp_path / "failed", **settings).run(resume="latest")
    assert losses(tmp_path / "failed") == losses(tmp_path / "whole")


def test_an_error_before_the_first_step_leaves_no_checkpoint(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        tiny_trainer(pairs, tmp_path, augment=Noisy(MemoryError(), 0)).run()
    assert _steps(tmp_path) == []


def test_a_step_that_was_half_taken_is_not_saved(pairs: Path, tmp_path: Path) -> None:
    """The weights have been updated and the counters have not."""
    trainer = tiny_trainer(pairs, tmp_path, **_one_stage(9))
    clamp = trainer.model.clamp_logit_scale_

    def fail_at_3() -> None:
        clamp()
        if trainer.step == 3:
            raise RuntimeError("in the middle")

    trainer.model.clamp_logit_scale_ = fail_at_3
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.run()
    assert _steps(tmp_path) == []


def test_a_save_that_fails_does_not_hide_the_error(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(pairs, tmp_path, augment=Noisy(MemoryError("first"), 2), **_one_stage(9))
    monkeypatch.setattr(trainer.store, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(MemoryError, match="first"):
        trainer.run()
    assert "step 2 could not be saved: [Errno 28] No space left" in caplog.text


def _evaluation(calls: list[tuple[int, int]], fails_at: int = -1) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return an `on_interval` that draws, notes (step, draw) and may fail, and the generators of its trainer."""
    generator = np.random.default_rng(7)

    def evaluate(trainer: Trainer, record: dict[str, Any]) -> dict[str, int]:
        calls.append((record["step"], int(generator.integers(1 << 30))))
        if record["step"] == fails_at:
            raise MemoryError("evaluation")
        return {"drawn": calls[-1][1]}

    return evaluate, {"evaluation": generator}


@pytest.mark.parametrize("save_every_steps", [pytest.param(2, id="saved-before"), pytest.param(None, id="saved-after")])
def test_a_failed_evaluation_loses_no_step_and_is_made_again(
    pairs: Path, tmp_path: Path, save_every_steps: int | None
) -> None:
    settings = _one_stage(6, log_every_n_steps=2, save_every_steps=save_every_steps)
    calls: dict[str, list[tuple[int, int]]] = {"whole": [], "failed": [], "resumed": []}
    for name, fails_at in (("whole", -1), ("failed", 4)):
        evaluate, generators = _evaluation(calls[name], fails_at)
        trainer = tiny_trainer(pairs, tmp_path / name, on_interval=evaluate, generators=generators, **settings)
        if name == "whole":
            trainer.run()
            continue
        with pytest.raises(MemoryError, match="evaluation"):
            trainer.run()
    assert max(_steps(tmp_path / "failed")) == 4
    evaluate, generators = _evaluation(calls["resumed"])
    trainer = tiny_trainer(pairs, tmp_path / "failed", on_interval=evaluate, generators=generators, **settings)
    trainer.run(resume="latest")
    assert [step for step, _ in calls["whole"]] == [2, 4, 6]
    assert calls["resumed"] == calls["whole"][1:]
    records = [(tmp_path / name / "checkpoints/results.jsonl").read_text() for name in ("whole", "failed")]
    drawn = [re.findall(r'"step": (\d+).*"drawn": (\d+)', text) for text in records]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3


def test_a_finished_run_is_not_evaluated_again(pairs: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    for resume in (None, "latest"):
        evaluate, generators = _evaluation(calls)
        trainer = tiny_trainer(pairs, tmp_path, on_interval=evaluate, generators=generators, **_one_stage(2))
        assert trainer.run(resume)["status"] == "finished"
    assert [step for step, _ in calls] == [1, 2]


def test_weights_that_are_nan_are_not_saved_and_end_the_run(pairs: Path, tmp_path: Path) -> None:
    def damage(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            with torch.no_grad():
                trainer.model.text_projection.weight[0, 0] = torch.nan

    settings = _one_stage(9, save_every_steps=2)
    message = (
        r"NaN or Inf in 1 weights after step 6 \(text_projection.weight\).* newest good checkpoint is .*step_4\.pt"
    )
    with pytest.raises(TrainingDivergedError, match=message):
        tiny_trainer(pairs, tmp_path, on_interval=damage, **settings).run()
    assert _steps(tmp_path) == [2, 4]
    assert tiny_trainer(pairs, tmp_path, **settings).run(resume="latest")["step"] == 9


def test_an_earlier_versions_nan_checkpoint_is_passed_over(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _one_stage(4, save_every_steps=1)
    trainer = tiny_trainer(pairs, tmp_path, **settings)
    trainer.run()
    state = trainer.store.load(trainer.store.path(4))
    state["model"]["text_projection.weight"][0, 0] = torch.inf
    trainer.store.save(4, state)
    with caplog.at_level(logging.INFO):
        tiny_trainer(pairs, tmp_path, **settings).run(resume="latest")
    assert re.search(r"passed over: checkpoint .*step_4\.pt holds NaN or Inf in text_projection\.weight", caplog.text)
    assert re.search(r"resumed from .*step_3\.pt", caplog.text)


def test_a_stop_while_the_data_do_not_come_saves_and_is_no_error(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_one_stage(9))
    whole = trainer.task.loader.batches

    def stuck(position: int, stopping: Callable[[], bool]) -> Iterator[Any]:
        for number, batch in enumerate(whole(position, stopping)):
            if number == 3:
                assert not stopping()
                signal.raise_signal(signal.SIGTERM)
                assert stopping()
                raise RuntimeError("no decoding worker answers")
            yield batch

    monkeypatch.setattr(trainer.task.loader, "batches", stuck)
    result = trainer.run()
    assert (result["status"], result["signal"], result["step"]) == ("stopped", "SIGTERM", 3)
    assert result["checkpoint"] == str(trainer.store.path(3)) and _steps(tmp_path) == [3]
    assert "gave up waiting for the next batch: no decoding worker" in (tmp_path / "out.log").read_text()


def test_sighup_stops_a_run_unless_it_was_ignored(pairs: Path, tmp_path: Path) -> None:
    def hang_up(trainer: Trainer, record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started these tests
    try:
        result = tiny_trainer(pairs, tmp_path / "terminal", on_interval=hang_up, **_one_stage(3)).run()
        assert (result["status"], result["signal"]) == ("stopped", "SIGHUP")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert tiny_trainer(pairs, tmp_path / "nohup", on_interval=hang_up, **_one_stage(3)).run()["step"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_run_is_kept_out_of_the_folder(pairs: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(trainer: Trainer, record: dict[str, Any]) -> None:
        with pytest.raises(RunInUseError) as caught:
            tiny_trainer(pairs, tmp_path, **_one_stage(2)).run(resume="latest")
        refused.append(str(caught.value))

    assert tiny_trainer(pairs, tmp_path, on_interval=start_another, **_one_stage(2)).run()["status"] == "finished"
    assert len(refused) == 2 and str(tmp_path) in refused[0]


def test_a_terminal_that_is_gone_does_not_end_a_run(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed:
        with pytest.raises(BrokenPipeError):
            closed.write("nobody reads this\n")
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        result = tiny_trainer(pairs, tmp_path, progress=True, **_one_stage(3)).run()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert result["status"] == "finished"
    assert (tmp_path / "out.log").read_text().count("Train Epoch") == 3


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"stages": STAGES[:1]}, "it belongs to stage 2 of 2, and this run has only 1"),
        (
            {},
            {"stages": (Stage(4, 16), Stage(5, 32, window_size=3))},
            "it was written after step 12, and this run ends at step 9",
        ),
        ({}, {"stages": (STAGES[0], Stage(9, 32, window_size=4))}, r"another model: image\.window_size 3, here 4"),
        ({}, {"model": "wider"}, r"another model: .*text\.width 16, here 32"),
        ({"format": 2}, {}, "it has format 2, and this version reads format 1"),
        ({"format": None}, {}, "it was not written by this trainer: it has no entry 'format'"),
        ({"optimizer": None, "rng": None}, {}, "it lacks optimizer, rng"),
        ({"counters": {"step": 3, "future": 1}}, {}, "whose entries do not fit it: TypeError: "),
        ({"rng": {"numpy": {"noise": ""}}}, {}, r"holds the NumPy generators \['noise'\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    pairs: Path, finished: Path, tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    store = tiny_trainer(pairs, tmp_path).store
    state = {**torch.load(finished, weights_only=True), **change}
    path = store.save(TOTAL_STEPS, {name: value for name, value in state.items() if value is not None})
    if settings.get("model") == "wider":
        config = tiny_model().config
        settings = {"model": Florence(dataclasses.replace(config, text=dataclasses.replace(config.text, width=32)))}
    with pytest.raises(ResumeError, match=message) as caught:
        tiny_trainer(pairs, tmp_path, **settings).run(resume="latest")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a whole run."""
    return Path(tiny_trainer(pairs, tmp_path_factory.mktemp("finished")).run()["checkpoint"])


def test_a_longer_schedule_and_other_data_are_named(
    pairs: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = write_pairs(tmp_path / "pairs", count=41)
    stages = (STAGES[0], Stage(steps=6, image_size=32, augment_text=False, batch_size=30, window_size=3))
    with caplog.at_level(logging.WARNING):
        settings = {"stages": stages, "warmup": None, "batch_size": 16, "lr_scheduler": "constant"}
        tiny_trainer(others, tmp_path / "run", **settings).run(resume=finished)
    for said in (
        "setting total_steps differs from the checkpoint's: 12, now 13",
        "setting warmup_steps differs from the checkpoint's: 2, now 1",
        "setting stages.1.batch_size differs from the checkpoint's: 36, now 30",
        "setting batch_size differs from the checkpoint's: 32, now 16",
        "setting lr_scheduler differs from the checkpoint's: 'cosine', now 'constant'",
        "data pairs differs from the checkpoint's: 40, now 41",
    ):
        assert said in caplog.text


def test_params_say_what_made_the_run(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, about={"model": "florence_x", "data": "pairs.csv"}, **_one_stage(1))
    trainer.run()
    lines = dict(line.split(": ", 1) for line in (tmp_path / "params.txt").read_text().splitlines())
    assert (lines["model"], lines["data"], lines["batch_size"]) == ("florence_x", "pairs.csv", "32")
    assert {"command", "commit", "version", "torch", "python", "threads"} <= lines.keys()
