"""Several processes train as one does on their joined batch, stop together and skip together."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from florence_fast.tasks.images import plain_images
from florence_fast.train.config import Stage
from florence_fast.train.engine import Trainer
from tests.train.processes import NUM_PROCESSES, Processes
from tests.train.tiny_run import losses, tiny_model, tiny_trainer, write_pairs

pytestmark = pytest.mark.dist
PER_RANK, JOINED = 9, 9 * NUM_PROCESSES
STAGES = (Stage(3, 16), Stage(2, 32, augment_text=False, window_size=3))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def _run(pairs: Path, out_dir: Path, batch_size: int, resume: str | None = None, **settings: Any) -> tuple[dict, dict]:
    model = tiny_model(drop_path_rate=0.0)
    settings = {"stages": STAGES, "augment": None, "batch_size": batch_size, **settings}
    trainer = tiny_trainer(pairs, out_dir, model=model, **settings)
    return trainer.run(resume), model.state_dict()


def train(group: dist.ProcessGroup, pairs: Path, out_dir: Path, batch_size: int, **settings: Any) -> tuple[dict, dict]:
    """Train on this rank; return the result and the weights."""
    return _run(pairs, out_dir, batch_size, **settings)


def train_cached(group: dist.ProcessGroup, pairs: Path, out_dir: Path) -> tuple[dict, dict]:
    """Train on this rank in parts of 4 images."""
    return _run(pairs, out_dir, PER_RANK, micro_batch_size=4)


def train_and_stop(group: dist.ProcessGroup, pairs: Path, out_dir: Path) -> tuple[dict, dict]:
    """Train until rank 1, and no other, is told to stop after step 2."""

    def stop_rank_1(trainer: Trainer, record: dict[str, Any]) -> None:
        if dist.get_rank() == 1 and record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    return _run(pairs, out_dir, PER_RANK, on_interval=stop_rank_1)


def train_damaged(group: dist.ProcessGroup, pairs: Path, out_dir: Path) -> tuple[dict, dict]:
    """Train while rank 2, and no other, sees NaN images in its second step."""
    plain = plain_images(tiny_model().config)

    def damage(images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        broken = dist.get_rank() == 2 and step == 1
        return plain(images, image_size, seed, step) * (torch.nan if broken else 1.0)

    return _run(pairs, out_dir, PER_RANK, augment=damage)


def train_unlike(group: dist.ProcessGroup, pairs: Path, other_pairs: Path, out_dir: Path, what: str) -> str:
    """Start training with something else than the others on rank 2; return the error."""
    odd = dist.get_rank() == 2
    settings: dict[str, Any] = {
        "augment": None,
        "model": tiny_model(drop_path_rate=0.1 if odd and what == "model" else 0.0),
    }
    if odd and what in ("batch_size", "seed"):
        settings[what] = 5
    resume = "latest" if odd and what == "resume" else None
    try:
        tiny_trainer(other_pairs if odd and what == "data" else pairs, out_dir, **settings).run(resume)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def start_again(group: dist.ProcessGroup, pairs: Path, out_dir: Path) -> str:
    """Start a new run in the folder of an earlier one, of which rank 0 alone knows; return the error."""
    try:
        tiny_trainer(pairs, out_dir if dist.get_rank() == 0 else out_dir / "elsewhere").run()
    except FileExistsError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("batch_size", "config.batch_size 32 on rank 0, 5 on rank 2"),
        ("seed", "config.seed 0 on rank 0, 5 on rank 2"),
        ("model", "model.config.image.drop_path_rate 0.0 on rank 0, 0.1 on rank 2"),
        ("data", "data.pairs 80 on rank 0, 81 on rank 2"),
        ("resume", "resume None on rank 0, 'latest' on rank 2"),
    ],
)
def test_ranks_that_differ_end_with_an_error_on_all(
    processes: Processes, pairs: Path, tmp_path: Path, what: str, named: str
) -> None:
    others = write_pairs(tmp_path / "pairs", count=81) if what == "data" else pairs
    answers = processes.run(train_unlike, NUM_PROCESSES, pairs, others, tmp_path / "run", what)
    assert len(set(answers)) == 1
    assert answers[0].startswith("RankMismatchError: all ranks of a run need the same command and data")
    assert named in answers[0]


def test_a_refusal_of_rank_0_reaches_all_ranks(processes: Processes, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.pt").write_bytes(b"")
    answers = processes.run(start_again, NUM_PROCESSES, pairs, tmp_path)
    assert all("holds a run already (step_1.pt)" in answer for answer in answers)


@pytest.mark.parametrize("function", [train, train_cached])
def test_four_processes_have_the_losses_of_one(
    processes: Processes, pairs: Path, tmp_path: Path, function: Any
) -> None:
    arguments = (PER_RANK,) if function is train else ()
    answers = processes.run(function, NUM_PROCESSES, pairs, tmp_path / "four", *arguments)
    alone, weights = _run(pairs, tmp_path / "one", JOINED)
    for step, values in losses(tmp_path / "one").items():
        for expected, value in zip(values.split(), losses(tmp_path / "four")[step].split(), strict=True):
            assert float.fromhex(value) == pytest.approx(float.fromhex(expected), rel=1e-3), f"step {step}"
    for rank, (result, own_weights) in enumerate(answers):
        assert result["position"] == alone["position"] == 5 * JOINED
        for name, weight in own_weights.items():
            assert torch.equal(weight, answers[0][1][name]), f"rank {rank}: {name}"
            torch.testing.assert_close(weight, weights[name], rtol=1e-2, atol=1e-3, msg=name)


def test_one_process_goes_on_where_four_were(processes: Processes, pairs: Path, tmp_path: Path) -> None:
    processes.run(train_and_stop, NUM_PROCESSES, pairs, tmp_path / "run")
    result, _ = _run(pairs, tmp_path / "run", JOINED, resume="latest")
    _run(pairs, tmp_path / "one", JOINED)
    assert result["position"] == 5 * JOINED
    first = {step: float.fromhex(values.split()[0]) for step, values in losses(tmp_path / "one").items()}
    joined = {step: float.fromhex(values.split()[0]) for step, values in losses(tmp_path / "run").items()}
    assert joined == pytest.approx(first, rel=1e-3)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(processes: Processes, pairs: Path, tmp_path: Path) -> None:
    answers = [result for result, _ in processes.run(train_and_stop, NUM_PROCESSES, pairs, tmp_path)]
    assert [(r["status"], r["step"]) for r in answers] == [("stopped", 3)] * NUM_PROCESSES
    assert [r["signal"] for r in answers] == [None, "SIGTERM", None, None]
    assert {r["checkpoint"] for r in answers} == {str(tmp_path / "checkpoints" / "step_3.pt")}
    assert (tmp_path / "checkpoints" / "step_3.pt").is_file()


def test_a_nan_on_one_rank_skips_the_step_on_all(processes: Processes, pairs: Path, tmp_path: Path) -> None:
    answers = processes.run(train_damaged, NUM_PROCESSES, pairs, tmp_path)
    assert [result["skipped_steps"] for result, _ in answers] == [1] * NUM_PROCESSES
    for _, weights in answers:
        assert all(weight.isfinite().all() for weight in weights.values())
        assert all(torch.equal(weight, answers[0][1][name]) for name, weight in weights.items())
    lines = (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] is None for line in lines] == [False, True, False, False, False]
