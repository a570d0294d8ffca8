"""The line that open_clip's readers parse, the records, the folders, and the clock that evaluations do not move."""

import json
import logging
import math
import time
from pathlib import Path

import pytest

from florence_fast.train.log import IntervalTimes, RunLog, Stopwatch, train_line, truncate_results

RECORD = {
    "step": 12,
    "epoch": 0,
    "position": 6144,
    "stage": 0,
    "loss": 4.25,
    "last_loss": 4.125,
    "grad_norm": 0.5,
    "lr": 0.00025,
    "logit_scale": 14.2857,
    "seconds": 10.0,
    "data_time": 0.0125,
    "batch_time": 0.5,
    "samples_per_second": 1024.0,
}
LINE = (
    "Train Epoch: 0 [6144/8666 (71%)] Data (t): 0.013 Batch (t): 0.500, 1024.00/s, 512.000/s/gpu "
    "LR: 0.000250 Logit Scale: 14.286 Loss: 4.1250 (4.2500)"
)


def _log(out_dir: Path, **settings: object) -> RunLog:
    return RunLog(out_dir, samples_per_epoch=8666, **{"progress": False, "tensorboard": False, **settings})


def test_the_line_is_open_clips() -> None:
    assert train_line(RECORD, samples_per_epoch=8666, world_size=2) == LINE


@pytest.mark.parametrize(
    ("position", "shown"), [(8666, "[8666/8666 (100%)]"), (8667, "[   1/8666 (0%)]"), (20000, "[2668/8666 (31%)]")]
)
def test_the_line_counts_within_the_epoch(position: int, shown: str) -> None:
    assert shown in train_line({**RECORD, "position": position}, samples_per_epoch=8666)


def test_a_run_writes_open_clips_folders(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.start(step=0, total_steps=20, settings={"lr": 0.1, "batch_size": 512})
        log.interval(RECORD)
        log.record({"step": 12, "top1": 0.5, "loss": math.nan})
        logging.getLogger("florence_fast.data").warning("a sample was skipped")
    assert (tmp_path / "params.txt").read_text() == "batch_size: 512\nlr: 0.1\n"
    out = (tmp_path / "out.log").read_text()
    assert "| INFO | Train Epoch: 0" in out
    assert "| WARNING | a sample was skipped" in out
    records = [json.loads(line) for line in (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()]
    assert records == [RECORD, {"step": 12, "top1": 0.5, "loss": None}]


def test_logging_is_left_as_it_was_and_the_error_that_ended_the_run_is_in_the_log(tmp_path: Path) -> None:
    package = logging.getLogger("florence_fast")
    handlers, level = list(package.handlers), package.level
    with pytest.raises(RuntimeError), _log(tmp_path) as log:
        log.start(step=0, total_steps=1, settings={})
        assert len(package.handlers) == len(handlers) + 1
        raise RuntimeError("too many bad samples")
    assert (package.handlers, package.level) == (handlers, level)
    assert "| ERROR | the run ended with RuntimeError: too many bad samples" in (tmp_path / "out.log").read_text()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with _log(tmp_path, enabled=False) as log:
        log.start(step=0, total_steps=1, settings={"lr": 1})
        log.step()
        log.interval(RECORD)
        log.sync()
    assert not list(tmp_path.iterdir())


def test_the_bar_starts_where_the_run_does_and_lines_show_above_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with _log(tmp_path, progress=True) as log:
        log.start(step=11, total_steps=20, settings={})
        log.interval(RECORD)
        log.step()
    shown = capsys.readouterr()
    assert "12/20" in shown.err
    assert LINE.split("Data")[0] in shown.out


def test_tensorboard_gets_every_scalar(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _log(tmp_path, tensorboard=True) as log:
        log.start(step=0, total_steps=20, settings={})
        log.interval(RECORD)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(12, 4.25)]
    assert "train/samples_per_second" in events.Tags()["scalars"]


@pytest.mark.parametrize("torn", ['{"step": 2, "to', '{"step": 2}', "\x00\x00\n"])
def test_results_after_the_step_and_torn_lines_are_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "top1": 0.5}\n{"step": 3}\n' + torn)
    assert truncate_results(path, step=2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "top1": 0.5}\n'
    assert truncate_results(path, step=2) == 0
    assert truncate_results(tmp_path / "absent.jsonl", step=0) == 0


def test_starting_at_a_step_drops_what_was_logged_after_it(tmp_path: Path) -> None:
    for start in (0, 4):
        with _log(tmp_path) as log:
            log.start(step=start, total_steps=20, settings={})
            for step in (start + 2, start + 4, start + 6):
                log.record({"step": step, "start": start})
    lines = (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [(2, 0), (4, 0), (6, 4), (8, 4), (10, 4)]


def test_the_stopwatch_does_not_count_pauses() -> None:
    watch = Stopwatch(100.0)
    time.sleep(0.1)
    with watch.paused():
        time.sleep(0.5)
    assert 100.1 <= watch.seconds < 100.5


def test_interval_times_average_over_steps() -> None:
    times = IntervalTimes()
    times.add(waited=1.0, samples=32)
    times.add(waited=3.0, samples=32)
    averages = times.averages()
    assert averages["data_time"] == 2.0
    assert averages["samples_per_second"] == pytest.approx(32 / averages["batch_time"])
