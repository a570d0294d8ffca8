"""Contrastive pretraining: SigLIP's loss, frozen towers, a compiled model, measurements, mixtures of sources."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from florence_fast.cli import main
from florence_fast.models import Florence, create_model
from florence_fast.tasks import ContrastiveTask
from florence_fast.train.config import Stage
from tests.tasks.tiny import write_images
from tests.train.tiny_run import losses, tiny_model, tiny_trainer, tokenizer, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on disk."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=40)


def siglip_model() -> Florence:
    """The tiny model with a bias of the logits."""
    model = tiny_model(drop_path_rate=0.0)
    torch.manual_seed(0)
    return Florence(replace(model.config, init_logit_bias=-10.0, init_logit_scale=10.0))


def _stage(steps: int = 1) -> dict[str, Any]:
    return {"stages": (Stage(steps, 16),), "warmup": 0, "save_every_steps": None, "augment": None}


@pytest.mark.parametrize("micro_batch_size", [None, 12])
@pytest.mark.parametrize("gather", ["all_gather", "ring"])
def test_siglip_is_a_sigmoid_for_each_pair(
    pairs: Path, tmp_path: Path, micro_batch_size: int | None, gather: str
) -> None:
    settings = {"loss": "siglip", "micro_batch_size": micro_batch_size, "gather": gather}
    trainer = tiny_trainer(pairs, tmp_path, **_stage(), model=siglip_model(), **settings)
    task, stage = trainer.task, trainer.config.stages[0]
    batch = next(task.batches(stage, 32, 0, lambda: False))
    value = task.backward(batch, stage, 0, trainer.state.scaler.scale, nullcontext)

    model = siglip_model()
    pixels = F.interpolate(batch.images.float() / 255, size=(16, 16), mode="area")
    u = F.normalize(model.encode_image((pixels - 0.5) / 0.25), dim=-1)
    v = F.normalize(model.encode_text(tokenizer(batch.texts)), dim=-1)
    logits = model.logit_scale.exp() * u @ v.T + model.logit_bias
    expected = -F.logsigmoid(logits * (2 * torch.eye(32) - 1)).sum() / 32
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        got = dict(task.model.named_parameters())[name].grad
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert model.logit_bias.grad.abs() > 1e-3


def test_siglip_logs_its_bias_and_its_weights_load_alone(pairs: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(pairs, tmp_path, **_stage(3), model=siglip_model(), loss="siglip")
    path = Path(trainer.run()["checkpoint"]).with_suffix(".safetensors")
    records = [json.loads(line) for line in (tmp_path / "checkpoints/results.jsonl").read_text().splitlines()]
    assert records[0]["logit_bias"] != records[-1]["logit_bias"] < -9
    assert (
        "Logit Bias: -9.9" in (tmp_path / "out.log").read_text()
        or "Logit Bias: -10.0" in (tmp_path / "out.log").read_text()
    )
    loaded = Florence.from_pretrained(path)
    assert loaded.logit_bias.item() == trainer.state.ema.average["logit_bias"].item()


def test_a_bias_needs_siglip_and_siglip_needs_a_bias(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss siglip needs a model with a logit_bias: create_model\(\.\.\., init_"):
        tiny_trainer(pairs, tmp_path, loss="siglip")
    trainer = tiny_trainer(pairs, tmp_path, **_stage(2), model=siglip_model(), loss="unicl")
    trainer.run()
    assert trainer.model.logit_bias.item() == -10 and "logit_bias" not in trainer.state.masters.named


def test_weights_without_a_bias_can_be_given_one() -> None:
    model = create_model("florence_nano", "artists", init_logit_bias=-10.0, init_logit_scale=10.0)
    plain = create_model("florence_nano", "artists")
    assert model.logit_bias.item() == -10 and plain.logit_bias is None
    assert torch.equal(model.logit_scale, plain.logit_scale), "what the weights hold is kept"
    image, text = torch.randn(1, 3, 64, 64), torch.ones(1, 4, dtype=torch.long)
    assert len(model(image, text)) == 4 and len(plain(image, text)) == 3
    model.output_dict = True
    assert model(image, text)["logit_bias"].item() == -10


@pytest.mark.parametrize(("lock", "still"), [("lock_image", ("visual.", "image_")), ("lock_text", ("text.", "text_"))])
@pytest.mark.parametrize("micro_batch_size", [None, 12])
def test_a_locked_tower_stays_as_it_is(
    pairs: Path, tmp_path: Path, lock: str, still: tuple[str, ...], micro_batch_size: int | None
) -> None:
    settings = {lock: True, "micro_batch_size": micro_batch_size, "log_every_n_steps": 1}
    trainer = tiny_trainer(pairs, tmp_path, **_stage(2), model=tiny_model(drop_path_rate=0.2), **settings)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if name.startswith(still)]
    assert {name for name in before if not name.startswith(still)} - changed <= {"text.positional_embedding"}


def test_a_compiled_model_has_the_same_losses_and_names(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    compile = torch.compile

    def with_eager(model: Any) -> Any:
        compiled.append(model)
        return compile(model, backend="eager")

    monkeypatch.setattr("florence_fast.train.parallel.torch.compile", with_eager)
    for name, wanted in (("plain", False), ("compiled", True)):
        model = tiny_model(drop_path_rate=0.0)
        trainer = tiny_trainer(pairs, tmp_path / name, **_stage(2), model=model, torchcompile=wanted)
        trainer.run()
    assert compiled == [trainer.model]
    assert losses(tmp_path / "compiled") == losses(tmp_path / "plain")
    assert not [name for name in trainer.state.state_dict()["model"] if "_orig_mod" in name]


def _command(data: object, logs: Path, *more: object) -> list[str]:
    common = ["train", "--train-data", data, "--device", "cpu", "--logs", logs, "--name", "run", "--precision", "fp32"]
    return [str(word) for word in (*common, "--batch-size", 4, "--force-image-size", 32, "--report-to", "none", *more)]


def test_open_clips_flags_measure_while_training(tmp_path: Path) -> None:
    images = write_images(tmp_path / "classes")
    flags = ["--val-data", images, "--imagenet-val", images, "--zeroshot-frequency", 1, "--epochs", 2]
    flags += ["--loss", "siglip", "--lock-image", "--lr-scheduler", "const-cooldown"]
    assert main(_command(images, tmp_path, *flags)) == 0
    records = [json.loads(line) for line in (tmp_path / "run/checkpoints/results.jsonl").read_text().splitlines()]
    measured = {record["step"]: record for record in records if "imagenet-zeroshot-val-top1" in record}
    assert list(measured) == [2, 4]
    keys = {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    keys |= {f"imagenet-zeroshot-val-{name}" for name in ("top1", "top5", "mean-per-class")}
    assert keys <= measured[4].keys() and all(0 <= measured[4][key] <= 1 for key in keys)
    params = (tmp_path / "run/params.txt").read_text()
    assert "lock_image: True\n" in params and f"imagenet_val: {images}\n" in params and "tensorboard: False\n" in params


def test_sources_are_mixed_by_their_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    images, seen = write_images(tmp_path / "classes"), []
    monkeypatch.setattr(ContrastiveTask, "setup", lambda self, run: seen.append(self.epoch_size) or 1 / 0)
    for factors in ("1::2.5", "3::1"):
        with pytest.raises(ZeroDivisionError):
            main(_command(f"{images}::{images}", tmp_path, "--train-data-upsampling-factors", factors, "--steps", 1))
    assert seen == [8 * 2 + 8 * 5, 8 * 3 + 8]
    for factors, said in (("1", "one for each of 2 sources, got 1"), ("1::x", "must be numbers as in 1::2.5, got 'x'")):
        flags = ["--train-data-upsampling-factors", factors]
        assert main(_command(f"{images}::{images}", tmp_path / "logs", *flags)) == 2
        assert said in capsys.readouterr().err
    assert main(_command(images, tmp_path / "logs", "--report-to", "wandbb")) == 2
    assert "did you mean 'wandb'" in capsys.readouterr().err
