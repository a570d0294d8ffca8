"""No input of a user reaches a traceback: wrong usage of every command is one line with exit code 2."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from florence_fast import native
from florence_fast.cli import main
from florence_fast.models import create_model
from florence_fast.models.factory import build_model
from florence_fast.models.registry import get_model_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two images, a table of them, and files that are not what commands want."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "red").save(folder / "images" / f"{name}.png")
    lines = ["filepath,title", *(f"{folder}/images/{name}.png,{name}" for name in ("a", "b", "a", "b"))]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "file").write_text("a file")
    (folder / "empty.pth").write_bytes(b"")
    save_file({"features": torch.zeros(1, 2)}, folder / "other.safetensors")
    state = create_model("florence_nano").state_dict()
    save_file({k: torch.full_like(t, float("nan")) for k, t in state.items()}, folder / "nan.safetensors")
    for name, settings in {
        "zero.json": {"batch_size": 0},
        "list.json": [1],
        "word.json": {"loss_reduction": "x", "batch_size": 2},
        "type.json": {"batch_size": "2"},
        "stages.json": {"stages": 3},
    }.items():
        (folder / name).write_text(json.dumps(settings))
    config = get_model_config("florence_nano")
    few = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=100))
    build_model(few).save_pretrained(folder / "few")
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


PREDICT = "predict --image {}/images/a.png --device cpu --pretrained none --texts a"
SEARCH = "search --images {}/images --device cpu --pretrained none --query a"
EVALUATE = "evaluate retrieval --data {}/pairs.csv --device cpu --pretrained none"
ZERO_SHOT = "evaluate zero-shot --data {}/pairs.csv --device cpu --pretrained none"
TRAIN = "train --train-data {}/pairs.csv --device cpu --logs {}/logs --name n --batch-size 2"
STEP = f"{TRAIN} --steps 1 --image-size 16"
FEW = "text.vocab_size must be at least 49408, that of the tokenizer, got 100"
CASES = {
    f"{PREDICT.removesuffix(' --pretrained none --texts a')} --pretrained {{}}/few --texts a": FEW,
    f"{SEARCH.replace('--pretrained none', '--pretrained {}/few')}": FEW,
    f"{EVALUATE.replace('--pretrained none', '--pretrained {}/few')}": FEW,
    f"{TRAIN} --steps 1 --model {{}}/few": FEW,
    f"{TRAIN} --steps 1 --pretrained {{}}/few": FEW,
    f"{ZERO_SHOT} --max-bad-share nan": "must lie in [0, 1]",
    f"{PREDICT} --template x": "a template must hold {}",
    f"{PREDICT} --template {{x}}": "a template must hold {}",
    f"{PREDICT} --template {{0.x}}": "a template must hold {}",
    f"{EVALUATE} --template {{1}}": "a template must hold {}",
    f"{PREDICT} --device meta": "device 'meta' cannot be used",
    f"{PREDICT} --device cpu:99:1": "device 'cpu:99:1' cannot be used",
    f"{PREDICT} --model coswin_nano": "is an image tower and reads no text",
    f"{PREDICT} --model nowhere/x": "no checkpoint at nowhere/x",
    f"{PREDICT} --pretrained {{}}/nan.safetensors": "holds NaN or infinite numbers",
    f"{PREDICT} --pretrained {{}}/empty.pth": "is empty: 0 bytes",
    f"{PREDICT} --pretrained {{}}/file": "must end in .safetensors",
    f"{PREDICT} --pretrained {{}}": "holds no model.safetensors",
    f"{PREDICT} --out {{}}": "is a folder, and a file was wanted",
    f"{PREDICT} --out {{}}/file/x.json": "is not a folder",
    f"{PREDICT} --out /dev/null": "is a device or a pipe",
    f"{PREDICT} --out /proc/x/y.json": "--out /proc/x/y.json cannot be written",
    f"{PREDICT} --out {{}}/{'x' * 300}/y.json": "cannot be written",
    f"{SEARCH} --out {{}}/file": "is not a folder",
    f"{SEARCH} --index {{}}/file": "is no index of images",
    f"{SEARCH} --index {{}}/other.safetensors": "it holds no features of images",
    f"{SEARCH} --index {{}}": "is a folder, and a file was wanted",
    f"{SEARCH} --model coswin_nano": "is an image tower and reads no text",
    f"{EVALUATE} --out {{}}": "is a folder, and a file was wanted",
    f"{ZERO_SHOT} --out {{}}/file/x": "is not a folder",
    f"{ZERO_SHOT} --classnames {{}}/gone.txt": "gone.txt",
    "convert {}/empty.pth {}/o.safetensors": "is empty: 0 bytes",
    "convert {}/other.safetensors {}/file": "is not a folder",
    "convert {}/other.safetensors {}/o.safetensors": "found nothing",
    "export florence_nano {}": "is a folder, and a file was wanted",
    "export florence_tiny {}/x.onnx": "florence_tiny comes without weights",
    "export florence_nano {}/x.txt": "a file of format 'onnx' ends in .onnx",
    "verify --out {}": "is a folder, and a file was wanted",
    "verify --device meta": "device 'meta' cannot be used",
    "profile --out {}/file": "is not a folder",
    "profile --trace {}": "is a folder, and a file was wanted",
    "profile --model nowhere": "unknown model 'nowhere'",
    "warmup --device meta": "device 'meta' cannot be used",
    "demo --out {}/file": "is not a folder",
    f"{STEP} --beta1 1": "beta1",
    f"{STEP} --wd nan": "weight_decay",
    f"{STEP} --crop x": "'x'; known: ",
    f"{STEP} --seed 18446744073709551616": "--seed",
    f"{STEP} --model coswin_nano": "coswin_nano is an image tower: contrastive training takes a dual encoder",
    f"{STEP} --logs {{}}/file": "is not a folder",
    f"{TRAIN} --steps 1 --force-image-size 1": "--image-size",
    f"{TRAIN.removesuffix(' --batch-size 2')} --config {{}}/zero.json": "batch_size must be at least 1, got 0",
    f"{TRAIN} --config {{}}/list.json": "must hold an object with RunConfig's settings, got list",
    f"{TRAIN} --config {{}}/deep.json": "nested",
    f"{TRAIN} --config {{}}/stages.json": "stages",
    f"{TRAIN.removesuffix(' --batch-size 2')} --config {{}}/type.json": "batch_size must be a whole number, got '2'",
    f"{STEP} --config {{}}/word.json": "reduction",
}


@pytest.mark.parametrize("command", CASES)
def test_wrong_usage_is_one_line_with_exit_code_2(command, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    # a template may hold braces of its own
    words = [word.replace("{}", str(place)) if word[:2] == "{}" else word for word in command.split()]
    try:
        assert main(words) == 2
    finally:
        shutil.rmtree(place / "logs", ignore_errors=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("florence-fast:")]
    assert len(said) == 1 and CASES[command] in said[0], said


VARIABLES = {
    "FLORENCE_FAST_CPU=vax": "unknown FLORENCE_FAST_CPU 'vax'",
    "FLORENCE_FAST_BACKEND=cuda": "unknown FLORENCE_FAST_BACKEND 'cuda'",
    "FLORENCE_FAST_AUTOTUNE=yes": "unknown FLORENCE_FAST_AUTOTUNE 'yes'; known: 0, 1",
    "FLORENCE_FAST_DEBUG=yes": "unknown FLORENCE_FAST_DEBUG 'yes'; known: 0, 1",
    "FLORENCE_FAST_NVTX=2": "unknown FLORENCE_FAST_NVTX '2'; known: 0, 1",
}


@pytest.mark.parametrize("command", [PREDICT, SEARCH, EVALUATE, STEP, "info", "warmup", "profile"])
@pytest.mark.parametrize("setting", VARIABLES)
def test_a_bad_variable_is_one_line_with_exit_code_2(setting, command, place, capsys, monkeypatch):
    monkeypatch.setenv(*setting.split("="))
    assert main(command.replace("{}", str(place)).split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert VARIABLES[setting] in said


@pytest.mark.native
def test_instructions_that_do_not_run_here_are_refused_at_once(place, capsys, monkeypatch):
    monkeypatch.setattr(native, "_LEVELS_HERE", ("scalar", "avx2"))
    monkeypatch.setenv("FLORENCE_FAST_CPU", "amx")
    for command in (PREDICT, STEP, "info"):
        assert main(command.replace("{}", str(place)).split()) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said == "florence-fast: FLORENCE_FAST_CPU=amx does not run here; these do: scalar, avx2"
    assert main(["--version"]) == 0 and main(["info", "--help"]) == 0


def test_a_backend_that_cannot_run_the_model_is_refused_by_its_variable(place, capsys, monkeypatch):
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "cpp")
    monkeypatch.setattr(native, "extension", lambda: None)
    assert main(PREDICT.replace("{}", str(place)).split()) == 2
    assert "florence-fast: FLORENCE_FAST_BACKEND=cpp: backend 'cpp' cannot run" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback_too(way, place, capsys, monkeypatch):
    monkeypatch.setenv("FLORENCE_FAST_DEBUG", "1" if way == "variable" else "")
    args = ["convert", str(place / "empty.pth"), str(place / "o.safetensors")]
    assert main([*args, "--debug"] if way == "flag" else args) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and said.splitlines()[-1].startswith("florence-fast: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 1, "florence-fast: failed: not enough memory: MemoryError"),
        (RuntimeError("can't allocate memory"), 1, "florence-fast: failed: not enough memory: can't allocate memory"),
        (RuntimeError("of torch"), 1, "florence-fast: failed: RuntimeError: of torch (--debug shows where)"),
        (
            ValueError("two\nlines \x1b[2J"),
            1,
            "florence-fast: failed: ValueError: two lines \\x1b[2J (--debug shows where)",
        ),
    ],
    ids=["memory", "allocator", "library", "escape"],
)
def test_failures_are_one_line(error, code, line, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr("florence_fast.cli.info.refusals_as_wrong_usage", __import__("contextlib").nullcontext)
    monkeypatch.setattr("florence_fast.info.collect", fail)
    assert main(["info"]) == code
    assert capsys.readouterr().err.strip() == line


def test_brackets_in_a_folder_and_in_texts_are_shown_as_they_are(place, capsys, monkeypatch):
    from pathlib import Path

    from florence_fast.demo import print_summary

    shares = {"r1": 0.1, "r5": 0.2, "r10": 0.3}
    zero_shot = {"images": 1, "classes": 2, "top1": 0.1, "top5": 0.2, "top10": 0.3}
    results = {
        "zero_shot": zero_shot,
        "grounds": {"white": 0.9, "mean": 0.8},
        "retrieval": {"image_to_text": shares, "text_to_image": shares},
    }
    print_summary({**results, "seconds": 1, "images_per_second": 2}, Path("x[/y]"))
    assert "x[/y]" in capsys.readouterr().out
    (place / "a[").mkdir()
    shutil.copy(place / "images" / "a.png", place / "a[" / "b].png")
    args = [
        "predict",
        "--image",
        str(place / "a[/b].png"),
        "--pretrained",
        "none",
        "--device",
        "cpu",
        "--texts",
        "[/c]",
        ":cat:",
    ]
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert "[/c]" in shown and ":cat:" in shown and "a[/b].png" in shown


def test_the_shipped_weights_say_what_they_were_trained_on(place, capsys):
    args = ["predict", "--image", str(place / "images/a.png"), "--device", "cpu", "--texts", "a", "b"]
    assert main(args) == 0
    assert "trained on emoji, not on photographs" in capsys.readouterr().err
    assert main([*args, "--pretrained", "none"]) == 0
    assert "emoji" not in capsys.readouterr().err
