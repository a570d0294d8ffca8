"""Where curves are shown: Weights & Biases by a stand-in, and nothing where nothing is wanted."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from florence_fast.train.boards import open_boards
from florence_fast.train.log import RunLog
from tests.train.test_log import RECORD


class Run:
    """What ``wandb.init`` returns."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_intervals_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    wandb = SimpleNamespace(init=lambda **options: runs.append(Run(options)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):  # a resumed run goes on with the same one
        settings = {"progress": False, "tensorboard": False, "wandb": True}
        with RunLog(tmp_path / "mine", samples_per_epoch=8666, **settings) as log:
            log.start(step=0, total_steps=20, settings={"lr": 0.1})
            log.interval(RECORD)
            log.evaluation({"step": 12, "top1": 0.5, "name": "x"})
    assert runs[0].options == runs[1].options and runs[0].finished
    assert runs[0].options["name"] == "mine" and runs[0].options["config"] == {"lr": 0.1}
    (step, training), (_, evaluation) = runs[0].logged
    assert step == 12 and training["train/loss"] == 4.25 and training["train/logit_scale"] == 14.2857
    assert evaluation == {"evaluate/step": 12, "evaluate/top1": 0.5}


def test_wandb_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"florence_fast\[wandb\]"):
        open_boards(tmp_path, 0, {}, tensorboard=False, wandb=True)
    assert open_boards(tmp_path, 0, {}, tensorboard=False, wandb=False) == []
