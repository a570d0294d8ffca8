"""Fine-tuning: the loss, what is frozen, rows of the head by class names, and a file that can be used alone."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from florence_fast.cli import main
from florence_fast.data.class_folders import ClassFolders
from florence_fast.models.classifier import Preprocessing, load_classifier, reset_head
from florence_fast.models.config import ImageConfig
from florence_fast.models.coswin import CoSwin
from florence_fast.tasks import ClassificationConfig, ClassificationTask
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.engine import Trainer
from florence_fast.train.reproducible import seed_step
from tests.tasks.tiny import CLASSES, QUIET, SETTINGS, write_images

pytestmark = pytest.mark.usefixtures("one_thread")
TOWER = ImageConfig("coswin", 24, (1, 2), (3, 24), img_size=16, window_size=2, drop_path_rate=0.3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of eight classes."""
    return write_images(tmp_path_factory.mktemp("images") / "classes")


def _tower(num_classes: int = len(CLASSES)) -> CoSwin:
    torch.manual_seed(0)
    return CoSwin(replace(TOWER, num_classes=num_classes))


def _task(images: Path, **settings: Any) -> ClassificationTask:
    return ClassificationTask(_tower(), ClassFolders(images), ClassificationConfig(**settings))


def _trainer(task: ClassificationTask, out_dir: Path, steps: int = 2, **settings: Any) -> Trainer:
    run = {**SETTINGS, **QUIET, "ema_decay": None, "stages": (Stage(steps, 16),), "warmup": 0, **settings}
    return Trainer(task, RunConfig(**run), out_dir)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"mixup": 0.5, "label_smoothing": 0.2}])
def test_the_loss_is_that_of_the_definition(images: Path, tmp_path: Path, settings: dict[str, float]) -> None:
    task = _task(images, **settings)
    stage = _trainer(task, tmp_path).config.stages[0]
    task.model.eval()
    batch = next(task.batches(stage, 8, 0, lambda: False))
    seed_step(0, 5, 0)
    loss = task.loss(batch, stage, 5)

    x = F.interpolate(batch.images.float() / 255, size=(16, 16), mode="area")
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (Preprocessing().image_mean, Preprocessing().image_std)
    )
    x, target = (x - mean) / std, torch.eye(8)[batch.labels]
    if settings.get("mixup"):
        seed_step(0, 5, 0)
        share = torch.distributions.Beta(0.5, 0.5).sample()
        assert 0 < share < 1
        x, target = share * x + (1 - share) * x.flip(0), share * target + (1 - share) * target.flip(0)
    smoothing = settings.get("label_smoothing", 0)
    target = (1 - smoothing) * target + smoothing / 8
    wanted = -(target * task.model(x).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_a_frozen_tower_stays_as_it_is_and_drops_no_path(images: Path, tmp_path: Path) -> None:
    task = _task(images, freeze_tower=True)
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    trainer = _trainer(task, tmp_path, lr=0.01)
    trainer.run()
    changed = {name for name, weight in task.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert {n for group in trainer.state.optimizer.param_groups for n in group["names"]} == changed
    image = torch.randn(4, 3, 16, 16)
    assert torch.equal(task.model.train()(image), task.model.eval()(image))


def test_layer_decay_gives_each_layer_its_rate(images: Path, tmp_path: Path) -> None:
    task = _task(images, layer_decay=0.5)
    trainer = _trainer(task, tmp_path, lr=0.8)
    trainer.run()
    found = {n: group["lr"] for group in trainer.state.optimizer.param_groups for n in group["names"]}
    last = found["head.weight"]
    layers = {"norm.weight": 4, "layers.1.blocks.1.attn.qkv.weight": 3, "layers.1.blocks.0.mlp.fc1.bias": 2}
    layers |= {"layers.0.downsample.proj.weight": 2, "layers.0.blocks.0.norm1.weight": 1, "patch_embed.proj.weight": 0}
    for name, layer in layers.items():
        assert found[name] == pytest.approx(last * 0.5 ** (4 - layer)), name


def test_rows_of_classes_that_are_known_by_name_are_kept() -> None:
    tower = _tower(3)
    old = tower.head.weight.clone()
    with torch.no_grad():
        tower.head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    reset_head(tower, ["zebra", "cat", "dog", "ant"], earlier=["ant", "bee", "cat"])
    assert tower.config.num_classes == 4 and tower.head.bias.tolist() == [0, 3, 0, 1]
    assert torch.equal(tower.head.weight[1], old[2]) and torch.equal(tower.head.weight[3], old[0])
    reset_head(tower, ["a", "b", "c", "d"])
    assert not tower.head.bias.any(), "rows without known names are drawn"


def test_a_head_of_other_classes_is_refused(images: Path) -> None:
    with pytest.raises(ValueError, match="model must have a head of 8 classes, got 3"):
        ClassificationTask(_tower(3), ClassFolders(images))


def _command(images: Path, logs: Path, *more: str) -> list[str]:
    return [
        *("train", "classification", "--train-data", str(images), "--model", "coswin_nano", "--device", "cpu"),
        *(
            "--logs",
            str(logs),
            "--name",
            "run",
            "--batch-size",
            "8",
            "--image-size",
            "32",
            "--precision",
            "fp32",
            *more,
        ),
    ]


def test_a_class_folder_is_fine_tuned_evaluated_and_asked_by_commands(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Path("florence_fast/models/weights/florence_nano-artists.safetensors").resolve()
    more = ["--pretrained", str(weights), "--val-data", str(images), "--steps", "12", "--evaluate-every-steps", "6"]
    more += ["--freeze-tower", "--lr", "0.05", "--crop", "squash"]
    assert main(_command(images, tmp_path, *more)) == 0
    run = tmp_path / "run"
    assert f"next: florence-fast evaluate classification --model {run} --data FOLDER" in capsys.readouterr().out
    records = [json.loads(line) for line in (run / "checkpoints/results.jsonl").read_text().splitlines()]
    measured = [record for record in records if "top1" in record]
    assert [record["step"] for record in measured] == [6, 12]
    assert measured[-1]["top1"] == measured[-1]["mean_per_class"] == 1 and measured[-1]["images"] == 8

    classifier = load_classifier(run)
    assert classifier.classes == CLASSES and classifier.tower.config.img_size == 32
    # those of the dual encoder whose tower it is, but for the crop
    assert classifier.preprocessing == Preprocessing((0.5,) * 3, (0.25,) * 3, "squash", "bicubic")

    assert main(["evaluate", "classification", "--model", str(run), "--data", str(images), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 1
    out = tmp_path / "answer.json"
    asked = ["predict", "--model", str(run), "--image", str(images / "teal/0.png"), "--out", str(out)]
    assert main([*asked, "--device", "cpu"]) == 0
    answers = json.loads(out.read_text())["answers"]
    assert answers[0]["class"] == "teal" and sum(a["probability"] for a in answers) == pytest.approx(1)

    # from that run on, to other classes: the rows of known ones are kept
    others = tmp_path / "others"
    for name in ("teal", "ebony"):
        (others / name).mkdir(parents=True)
        Image.open(images / "teal" / "0.png").save(others / name / "0.png")
    again = ["--pretrained", str(run), "--steps", "1", "--name", "again"]
    with caplog.at_level(logging.INFO):
        assert main(_command(others, tmp_path, *again)) == 0
    assert "the head keeps 1 of 2 classes by name" in caplog.text


@pytest.mark.parametrize(
    ("folders", "more", "said"),
    [
        (["a"], [], "must hold two class folders or more, got a"),
        (["train", "val"], [], "holds parts of a data set in place of classes: train, val"),
        (["a", "b"], ["--val-data", "{}/other"], "amberr is none of the 2 classes (did you mean 'amber'?)"),
        (["a", "b"], ["--layer-decay", "0"], "layer_decay must lie in (0, 1], got 0.0"),
        (["a", "b"], ["--label-smoothing", "nan"], "label_smoothing must lie in [0, 1), got nan"),
        (["a", "b"], ["--loss", "clip"], "No such option: --loss"),
        (["a", "b"], ["--train-data", "{}/gone"], "gone does not exist"),
        (["a", "b"], ["--train-data", "{}/x.csv"], "x.csv is not a folder"),
    ],
)
def test_wrong_usage_is_one_line(
    folders: list[str], more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = {"a": "amber", "b": "blue"}
    for name in [*(f"data/{names.get(name, name)}" for name in folders), "other/amberr"]:
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    (tmp_path / "x.csv").write_text("filepath,title\n")
    more = [word.replace("{}", str(tmp_path)) for word in more]
    assert main([*_command(tmp_path / "data", tmp_path / "logs"), *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("florence-fast:")]
    wanted = said.replace("got a", "got amber") if said.endswith("got a") else said
    assert len(lines) == 1 and wanted in lines[0]
    assert not (tmp_path / "logs").exists()


def test_other_weights_are_no_classifier(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    _tower().save_pretrained(tmp_path)
    assert main(["evaluate", "classification", "--model", str(tmp_path), "--data", str(images)]) == 2
    assert "holds no classifier: its header names no classes" in capsys.readouterr().err
    assert main(["predict", "--image", str(images / "teal/0.png")]) == 2
    assert "--texts is needed" in capsys.readouterr().err
