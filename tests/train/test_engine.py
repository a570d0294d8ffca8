"""The training loop: what a step computes, what it refuses, and what it leaves behind."""

import json
import logging
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from florence_fast.models import Florence
from florence_fast.tasks.images import plain_images
from florence_fast.train.config import Stage
from florence_fast.train.engine import Trainer, TrainingDivergedError
from tests.train.tiny_run import losses, tiny_model, tiny_trainer, tokenizer, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=40)


def _stage(steps: int, **settings: Any) -> dict[str, Any]:
    return {"stages": (Stage(steps=steps, image_size=16, **settings),), "warmup": 0, "save_every_steps": None}


class Damaged:
    """An augmentation that hands NaN images to some steps."""

    def __init__(self, model: Florence, steps: set[int]) -> None:
        self.plain, self.steps = plain_images(model.config), steps

    def __call__(self, images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        return self.plain(images, image_size, seed, step) * (torch.nan if step in self.steps else 1.0)


def test_it_learns_which_name_belongs_to_which_image(pairs: Path, tmp_path: Path) -> None:
    tiny_trainer(pairs, tmp_path, **_stage(20, augment_text=False), log_every_n_steps=5, augment=None).run()
    # Five names in 32 images: no loss is less than the entropy within a name, about log(32 / 5) = 1.9.
    first, *_, last = (float.fromhex(values.split()[0]) for values in losses(tmp_path).values())
    assert first > 3
    assert last < 2.1


@pytest.mark.parametrize("loss", ["unicl", "clip"])
def test_loss_and_gradients_are_those_of_the_definition(pairs: Path, tmp_path: Path, loss: str) -> None:
    """Every text is encoded, with its padding, and every pair compared: no step of ours is a shortcut in value."""
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1), model=tiny_model(drop_path_rate=0.0), loss=loss, augment=None)
    task, stage = trainer.task, trainer.config.stages[0]
    batch = next(task.batches(stage, 32, 0, lambda: False))
    assert len(set(batch.texts)) < len(batch.texts)
    value = task.backward(batch, stage, 0, trainer.state.scaler.scale, nullcontext)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}

    model = tiny_model(drop_path_rate=0.0)
    pixels = F.interpolate(batch.images.float() / 255, size=(16, 16), mode="area")
    u = F.normalize(model.encode_image((pixels - 0.5) / 0.25), dim=-1)
    v = F.normalize(model.encode_text(tokenizer(batch.texts)), dim=-1)
    logits = model.logit_scale.exp() * u @ v.T
    same = batch.labels[:, None] == batch.labels if loss == "unicl" else torch.eye(32, dtype=torch.bool)
    target = same.float() / same.sum(1, keepdim=True)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_each_distinct_text_is_encoded_once_and_cut_to_the_longest(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1))
    batch = next(iter(trainer.task.loader.batches(0)))
    prepared = trainer.task.prepare(batch, trainer.config.stages[0], 0)
    assert len(prepared.tokens) == len(set(batch.texts))
    assert prepared.tokens.shape[1] == min(12, max(map(len, batch.texts)) + 2)
    assert torch.equal(prepared.tokens[prepared.which], tokenizer(batch.texts)[:, : prepared.tokens.shape[1]])


def test_the_gradient_cache_changes_nothing_but_memory(pairs: Path, tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("cached", 12)):
        model = tiny_model(drop_path_rate=0.0)
        tiny_trainer(pairs, tmp_path / name, **_stage(3), model=model, micro_batch_size=micro).run()
    for step, whole in losses(tmp_path / "whole").items():
        cached = losses(tmp_path / "cached")[step]
        for expected, value in zip(whole.split(), cached.split(), strict=True):
            assert float.fromhex(value) == pytest.approx(float.fromhex(expected), rel=1e-3)


def test_a_nan_step_is_skipped_counted_and_named(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    weights: dict[int, Tensor] = {}

    def remember(trainer: Trainer, record: dict[str, Any]) -> None:
        weights[record["step"]] = trainer.model.image_projection.weight.detach().clone()

    trainer = tiny_trainer(pairs, tmp_path, **_stage(4), model=model, augment=Damaged(model, {1}), on_interval=remember)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[3], weights[2])
    assert (result["skipped_steps"], result["skipped_in_a_row"], result["step"]) == (1, 0, 4)
    assert "step 1 skipped: the loss is nan" in caplog.text
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert trainer.state.optimizer.state[model.image_projection.weight]["step"] == 3
    assert trainer.state.ema.updates == 3
    record = [json.loads(line) for line in (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()][1]
    assert (record["step"], record["loss"], record["skipped_steps"]) == (2, None, 1)


def test_an_infinite_gradient_is_named_by_its_parameter(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1))
    before = trainer.model.text_projection.weight.detach().clone()
    trainer.model.text_projection.weight.register_hook(lambda gradient: gradient * torch.inf)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "the gradient's norm is" in caplog.text
    assert "in the gradients of 1 parameters (text_projection.weight)" in caplog.text
    assert torch.equal(trainer.model.text_projection.weight, before)


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_the_good_ones_are_saved(pairs: Path, tmp_path: Path) -> None:
    model = tiny_model()
    damaged = Damaged(model, {0, 1, 3, 4, 5, 6})
    trainer = tiny_trainer(pairs, tmp_path, **_stage(9), model=model, augment=damaged, max_skipped_steps=2)
    with pytest.raises(TrainingDivergedError, match="3 steps in a row were skipped, more than max_skipped_steps=2"):
        trainer.run()
    assert "| ERROR | the run ended with TrainingDivergedError" in (tmp_path / "out.log").read_text()
    saved = trainer.store.load(trainer.store.path(6))
    assert (saved["counters"]["step"], saved["counters"]["skipped_steps"]) == (6, 5)
    assert saved["optimizer"]["state"][0]["step"] == 1
    model = tiny_model()
    trainer = tiny_trainer(pairs, tmp_path, **_stage(9), model=model, augment=Damaged(model, set()))
    result = trainer.run(resume="latest")
    assert (result["step"], result["skipped_steps"], result["skipped_in_a_row"]) == (9, 5, 0)


def test_gradients_are_clipped_to_the_norm(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1), grad_clip_norm=1e-3)
    result = trainer.run()
    clipped = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert result["grad_norm"] > 1e-2
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_temperature_stays_within_its_bounds(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1))
    with torch.no_grad():
        trainer.model.logit_scale.fill_(9.0)
    trainer.run()
    assert trainer.model.logit_scale.exp().item() == pytest.approx(100.0)


def test_an_evaluation_leaves_no_trace_in_time_or_numbers(pairs: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, bool]] = []

    def evaluate(trainer: Trainer, record: dict[str, Any]) -> dict[str, float]:
        calls.append((record["step"], trainer.model.training))
        torch.rand(1000)
        time.sleep(0.4)
        return {"top1": 0.25}

    tiny_trainer(pairs, tmp_path / "plain", **_stage(4)).run()
    started = time.perf_counter()
    result = tiny_trainer(pairs, tmp_path / "evaluated", **_stage(4), log_every_n_steps=2, on_interval=evaluate).run()
    wall_seconds = time.perf_counter() - started
    tiny_trainer(pairs, tmp_path / "every_second", **_stage(4), log_every_n_steps=2).run()
    assert calls == [(2, False), (4, False)]
    assert wall_seconds - result["seconds"] > 0.8
    lines = (tmp_path / "evaluated" / "checkpoints" / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], r.get("top1")) for r in records] == [(2, None), (2, 0.25), (4, None), (4, 0.25)]
    trained = {r["step"]: r["last_loss"] for r in records if "last_loss" in r}
    plain = [json.loads(line) for line in (tmp_path / "plain/checkpoints/results.jsonl").read_text().splitlines()]
    assert trained == {r["step"]: r["last_loss"] for r in plain if r["step"] in (2, 4)}


def test_stages_change_what_the_model_sees(pairs: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, int]] = []
    model = tiny_model()
    plain = plain_images(model.config)

    def watch(images: Tensor, image_size: int, seed: int, step: int) -> Tensor:
        table = model.visual.layers[0].blocks[0].attn.relative_position_bias_table
        seen.append((step, len(images), image_size, len(table)))
        return plain(images, image_size, seed, step)

    stages = (Stage(1, 16), Stage(1, 32, window_size=4, batch_size=20, augment_text=False), Stage(1, 16))
    tiny_trainer(pairs, tmp_path, stages=stages, model=model, augment=watch).run()
    assert seen == [(0, 32, 16, 9), (1, 20, 32, 49), (2, 32, 16, 49)]
    assert model.config.image.window_size == 4


def test_the_weights_for_use_are_the_average_and_load_by_themselves(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(3))
    path = Path(trainer.run()["checkpoint"]).with_suffix(".safetensors")
    loaded = Florence.from_pretrained(path)
    assert loaded.config == trainer.model.config
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, trainer.state.ema.average[name], rtol=0, atol=0)
    assert not torch.equal(loaded.image_projection.weight, trainer.model.image_projection.weight)


@pytest.mark.parametrize(
    ("crop", "resize_mode"), [(None, "longest"), ("random_resized", "longest"), ("squash", "squash")]
)
def test_training_and_evaluation_resize_in_one_way(pairs: Path, tmp_path: Path, crop: str, resize_mode: str) -> None:
    model = tiny_model()
    model.config = replace(model.config, resize_mode="longest", interpolation="bilinear")
    trainer = tiny_trainer(pairs, tmp_path, **_stage(1), model=model, crop=crop)
    assert (trainer.task.loader.crop, trainer.task.loader.interpolation) == (crop or resize_mode, "bilinear")
    loaded = Florence.from_pretrained(Path(trainer.run()["checkpoint"]).with_suffix(".safetensors"))
    assert loaded.config.resize_mode == model.config.resize_mode == resize_mode


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp", "bf16"])
def test_precisions(pairs: Path, tmp_path: Path, precision: str) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(2), precision=precision)
    result = trainer.run()
    assert result["skipped_steps"] == 0
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {parameter.dtype for parameter in (p for p in trainer.model.parameters() if p.ndim == 4)} == {wanted}
    assert trainer.model.logit_scale.dtype == torch.float32


def test_signals_and_determinism_are_as_before_after_a_run(pairs: Path, tmp_path: Path) -> None:
    inside: list[Any] = []

    def look(trainer: Trainer, record: dict[str, Any]) -> None:
        inside.extend((signal.getsignal(signal.SIGTERM), torch.are_deterministic_algorithms_enabled()))

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    tiny_trainer(pairs, tmp_path, **_stage(1), on_interval=look).run()
    assert inside[0] is not before[0]
    assert inside[1] is True
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert torch.are_deterministic_algorithms_enabled() is False


def test_sigint_saves_without_another_evaluation(pairs: Path, tmp_path: Path) -> None:
    evaluated: list[int] = []

    def interrupt(trainer: Trainer, record: dict[str, Any]) -> None:
        evaluated.append(record["step"])
        signal.raise_signal(signal.SIGINT)

    result = tiny_trainer(pairs, tmp_path, **_stage(9), on_interval=interrupt).run()
    assert (result["status"], result["signal"], result["step"]) == ("stopped", "SIGINT", 2)
    assert Path(result["checkpoint"]).is_file()
    assert list(losses(tmp_path)) == [1, 2]
    assert evaluated == [1]


def test_a_second_sigint_interrupts_at_once(pairs: Path, tmp_path: Path) -> None:
    def interrupt(trainer: Trainer, record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(pairs, tmp_path, **_stage(9), on_interval=interrupt).run()
    assert signal.getsignal(signal.SIGINT) is before


class Norm:
    """Measures the text projection, and what mode the model is in."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def run(self, model: Florence) -> dict[str, float]:
        self.modes.append(model.training)
        torch.rand(7)
        return {"norm": model.text_projection.weight.norm().item()}


def test_evaluators_run_at_intervals_and_at_the_end_on_the_average(pairs: Path, tmp_path: Path) -> None:
    norm = Norm()
    settings = {"log_every_n_steps": 2, "evaluate_every_steps": 3, "evaluators": [norm]}
    trainer = tiny_trainer(pairs, tmp_path / "evaluated", **_stage(7), **settings)
    trainer.run()
    records = [json.loads(line) for line in (tmp_path / "evaluated/checkpoints/results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 3, 4, 6, 6, 7, 7]
    found = {record["step"]: record["norm"] for record in records if "norm" in record}
    assert list(found) == [3, 6, 7] and norm.modes == [False] * 3
    assert found[7] == trainer.state.ema.average["text_projection.weight"].norm().item()
    assert found[7] != trainer.model.text_projection.weight.norm().item()
    plain = tiny_trainer(pairs, tmp_path / "plain", **_stage(7))
    plain.run()
    assert plain.counters.last_loss == trainer.counters.last_loss, "an evaluation leaves no trace in the training"


def test_an_evaluation_that_a_stop_left_out_is_made_on_resume(pairs: Path, tmp_path: Path) -> None:
    def stop(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    settings = {**_stage(4), "evaluate_every_steps": 3}
    tiny_trainer(pairs, tmp_path, **settings, evaluators=[Norm()], on_interval=stop).run()
    tiny_trainer(pairs, tmp_path, **settings, evaluators=[Norm()]).run(resume="latest")
    lines = (tmp_path / "checkpoints/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "norm" in line.split('"grad_')[0]] == [3, 4]


class Killed(BaseException):
    """Nothing of ours runs after it, as after SIGKILL."""


def test_a_kill_while_evaluators_run_loses_no_step(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**_stage(6), "save_every_steps": None, "evaluate_every_steps": 3}
    killed = Norm()
    monkeypatch.setattr(killed, "run", lambda model: (_ for _ in ()).throw(Killed))
    trainer = tiny_trainer(pairs, tmp_path, **settings, evaluators=[killed])
    monkeypatch.setattr(trainer, "_save_before_leaving", lambda: None)
    with pytest.raises(Killed):
        trainer.run()
    norm = Norm()
    assert tiny_trainer(pairs, tmp_path, **settings, evaluators=[norm]).run(resume="latest")["step"] == 6
    assert len(norm.modes) == 2, "after steps 3 and 6"
