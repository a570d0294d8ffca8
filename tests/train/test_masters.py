"""Training of 16-bit weights: nothing stands still, the path is fp32's, and a resumed run is equal to the bit."""

from pathlib import Path

import pytest
import torch

from florence_fast import precision
from florence_fast.precision import Choice
from florence_fast.train.config import Stage
from florence_fast.train.ema import EMA
from florence_fast.train.engine import Trainer
from florence_fast.train.masters import MasterWeights
from tests.train.tiny_run import losses, tiny_model, tiny_trainer, write_pairs

SLOW = {"lr": 5e-4, "warmup": 0, "ema_decay": None, "batch_size": 16}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=40)


def _trained(pairs: Path, folder: Path, word: str, steps: int = 8) -> Trainer:
    model = tiny_model(drop_path_rate=0)
    trainer = tiny_trainer(pairs, folder / word, model=model, stages=(Stage(steps, 16),), precision=word, **SLOW)
    trainer.run()
    return trainer


def _steps_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """How far each parameter has come, the masters' way where there are masters."""
    start = dict(tiny_model().named_parameters())
    return {name: (p.detach().float() - start[name].detach()) for name, p in trainer.state.masters.named.items()}


@pytest.mark.parametrize("word", ["bf16", "fp16"])
def test_every_parameter_moves_and_the_path_is_that_of_fp32(pairs: Path, tmp_path: Path, word: str) -> None:
    exact, low = _steps_of(_trained(pairs, tmp_path, "fp32")), _trained(pairs, tmp_path, word)
    assert low.model.logit_scale.dtype == torch.float32
    assert low.model.image_projection.weight.dtype == precision.weights_dtype(word)
    found = _steps_of(low)
    assert found.keys() == exact.keys()
    still = [name for name, step in found.items() if not step.any() and exact[name].any()]
    assert not still
    # AdamW's steps have the size of the learning rate whatever the gradient's, so that noise turns some of them around.
    cosines = {n: torch.nn.functional.cosine_similarity(found[n].flatten(), exact[n].flatten(), 0) for n in exact}
    whole = [torch.cat([steps[name].flatten() for name in exact]) for steps in (found, exact)]
    assert torch.nn.functional.cosine_similarity(*whole, 0) > 0.9, min(cosines.items(), key=lambda item: item[1])
    assert whole[0].norm().item() == pytest.approx(whole[1].norm().item(), rel=0.1)
    assert found["logit_scale"].item() == pytest.approx(exact["logit_scale"].item(), rel=0.1)


def test_steps_below_half_a_spacing_add_up() -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    masters = MasterWeights(model, "bf16")
    optimizer = torch.optim.SGD(masters.named.values(), lr=1.0)
    for _ in range(64):
        model.weight.grad = torch.full_like(model.weight, 2.0**-11)
        masters.take_gradients()
        assert model.weight.grad is None
        optimizer.step()
        masters.give_weights()
    assert masters.copies["weight"].item() == 1 - 64 * 2.0**-11
    assert model.weight.item() == 1 - 64 * 2.0**-11


def test_a_pure_word_keeps_no_copies_and_says_what_that_costs(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trained(pairs, tmp_path, "pure_bf16", steps=2)
    assert not trainer.state.masters.copies
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert any("small updates are lost" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("word", ["bf16", "fp16"])
def test_a_resumed_run_is_the_same_to_the_bit(pairs: Path, tmp_path: Path, word: str) -> None:
    stages = (Stage(4, 16), Stage(4, 16, window_size=3))
    settings = {"stages": stages, "precision": word, "batch_size": 16, "save_every_steps": 3}
    tiny_trainer(pairs, tmp_path / "whole", **settings).run()
    first = tiny_trainer(pairs, tmp_path / "parts", **settings, on_interval=_stop_after(3))
    assert first.run()["status"] == "stopped"
    second = tiny_trainer(pairs, tmp_path / "parts", **settings)
    second.run(resume="latest")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for folder in ("whole", "parts"):
        assert len(losses(tmp_path / folder)) == 8


def _stop_after(step: int):
    import signal

    def stop(trainer: Trainer, record: dict) -> None:
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return stop


def test_the_average_follows_the_masters() -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    masters = MasterWeights(model, "bf16")
    with torch.no_grad():
        masters.copies["weight"].fill_(1 + 2.0**-10)  # which bf16 rounds to 1
    masters.give_weights()
    ema = EMA(model, decay=0.5)
    for _ in range(30):
        ema.update(model, masters.copies)
    assert model.weight.item() == 1
    assert ema.average["weight"].item() == pytest.approx(1 + 2.0**-10, abs=1e-7)


def test_a_run_is_not_continued_with_weights_of_another_kind(pairs: Path, tmp_path: Path) -> None:
    tiny_trainer(pairs, tmp_path, stages=(Stage(2, 16),), precision="bf16").run()
    for word in ("fp32", "amp_bf16", "pure_bf16", "fp16"):
        with pytest.raises(ValueError, match=f"trained at precision bf16.*{word}: continue it with precision bf16"):
            tiny_trainer(pairs, tmp_path, stages=(Stage(3, 16),), precision=word).run(resume="latest")


@pytest.mark.parametrize("resolved", ["fp32", "amp_bf16"])
def test_a_run_records_what_auto_meant_and_warns_when_it_means_something_else(
    pairs: Path, tmp_path: Path, resolved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from florence_fast.train import engine

    def pretend(word: str) -> None:
        monkeypatch.setattr(engine, "choose_precision", lambda *_: Choice(word, "as pretended"))
        monkeypatch.setattr(engine, "resolve_precision", lambda *_: word)

    pretend(resolved)
    result = tiny_trainer(pairs, tmp_path, stages=(Stage(2, 16),), precision="auto").run()
    state = torch.load(result["checkpoint"], weights_only=True)
    assert state["config"]["precision"] == resolved
    assert f"precision: {resolved}\n" in (tmp_path / "params.txt").read_text()
    assert f"precision {resolved}: as pretended" in caplog.text
    other = {"fp32": "amp_bf16", "amp_bf16": "fp32"}[resolved]
    pretend(other)
    tiny_trainer(pairs, tmp_path, stages=(Stage(3, 16),), precision="auto").run(resume="latest")
    assert f"setting precision differs from the checkpoint's: '{resolved}', now '{other}'" in caplog.text
