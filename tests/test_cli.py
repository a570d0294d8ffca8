"""The command line: what it answers, its exit codes, and that wrong usage is one clear line with exit code 2."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from florence_fast import __version__
from florence_fast.cli import main
from florence_fast.data.loader import BadDataError
from florence_fast.tasks import TASKS
from florence_fast.train.checkpoint import CheckpointStore

COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "predict",
    "search",
    "convert",
    "export",
    "info",
    "verify",
    "profile",
    "warmup",
)
TINY = ["--pretrained", "none", "--device", "cpu"]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of four images, two of them in a folder of their own, and one file that only says it is an image."""
    folder = tmp_path / "images"
    (folder / "fruit").mkdir(parents=True)
    for name, colour in {"red": "red", "blue": "blue", "fruit/apple": "green", "fruit/lemon": "yellow"}.items():
        Image.new("RGB", (20, 12), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more than a beginning")
    return folder


@pytest.fixture
def pairs(images) -> Path:
    """A TSV file with open_clip's column names."""
    rows = ["filepath\ttitle"] + [f"{images / name}.png\ta {name} thing" for name in ("red", "blue", "fruit/apple")]
    file = images.parent / "pairs.tsv"
    file.write_text("\n".join(rows) + "\n")
    return file


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    """Run a command that must be refused, and return its one line."""
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err


def test_help_names_every_command_and_nothing_else(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.split("Commands:")[1].strip().splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(COMMANDS)
    assert not any("..." in line for line in lines), "a summary is too long for the list of commands"
    assert main([]) == 0


@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS] + [["evaluate", "zero-shot"], ["evaluate", "retrieval"]]
)
def test_every_command_explains_itself(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "Options:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_the_module_runs_as_the_command_does():
    shown = subprocess.run([sys.executable, "-m", "florence_fast", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--train-data", "x", "--bach-size", "8"], "--batch-size"),
        (["train"], "Missing option '--train-data'"),
        (["train", "--train-data", "x", "--batch-size", "many"], "'--batch-size'"),
        (["predict", "--texts", "a cat"], "Missing option '--image'"),
        (["evaluate"], "Missing command"),
    ],
    ids=["command", "option", "missing", "value", "image", "subcommand"],
)
def test_wrong_usage_is_one_line_that_names_the_nearest(args, said, capsys):
    assert said in refused(capsys, *args)


def test_refusals_of_the_commands_are_wrong_usage_too(capsys, images, pairs, tmp_path):
    image = images / "red.png"
    predict = ["predict", "--image", image, "--texts", "a"]
    assert "did you mean 'florence_nano'" in refused(capsys, *predict, "--model", "florence_nanoo", *TINY)
    assert "nowhere.png" in refused(capsys, "predict", "--image", tmp_path / "nowhere.png", "--texts", "a", *TINY)
    assert "'abacus'" in refused(capsys, *predict, "--pretrained", "none", "--device", "abacus")
    assert "did you mean 'amp_bf16'" in refused(capsys, *predict, *TINY, "--precision", "amp_bf61")
    assert "no such folder" in refused(capsys, "search", "--images", tmp_path / "no", "--query", "a", *TINY)
    assert "no images" in refused(capsys, "search", "--images", empty(tmp_path), "--query", "a", *TINY)
    train = ["train", "--device", "cpu", "--logs", tmp_path / "logs", "--train-data"]
    assert "nowhere.csv" in refused(capsys, *train, tmp_path / "nowhere.csv")
    assert "one length" in refused(capsys, *train, pairs, "--steps", 1, "--epochs", 1)
    assert "--name" in refused(capsys, *train, pairs, "--resume", "latest")
    assert "did you mean 'unicl'" in refused(capsys, *train, pairs, "--loss", "unicls")
    assert "'two' is none of plain" in refused(capsys, "evaluate", "zero-shot", "--data", pairs, "--templates", "two")
    assert not (tmp_path / "logs").exists(), "a refused run left something behind"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_demo_passes_its_flags_on_and_keeps_an_earlier_run(capsys, monkeypatch, tmp_path):
    import florence_fast.demo

    asked = []
    monkeypatch.setattr(florence_fast.demo, "run", lambda out, **flags: asked.append((out, flags)) or {})
    flags = ["--long", "--steps", "3", "--seed", "7", "--loss", "clip", "--device", "cpu"]
    assert main(["demo", "--out", str(tmp_path), *flags]) == 0
    settings = {"long": True, "pretrained": None, "minutes": None, "steps": 3, "loss": "clip", "seed": 7}
    assert asked == [(tmp_path, {**settings, "resume": False, "device": "cpu"})]
    (tmp_path / "training/checkpoints").mkdir(parents=True)
    (tmp_path / "training/checkpoints/step_5.pt").write_bytes(b"")
    assert "holds a run already: --resume goes on" in refused(capsys, "demo", "--out", tmp_path)
    assert main(["demo", "--out", str(tmp_path), "--resume"]) == 0
    assert asked[1][1]["resume"] and len(asked) == 2
    assert main(["demo", "--out", str(tmp_path / "b"), "--pretrained", "artists", "--minutes", "2.5"]) == 0
    assert asked[2][1]["pretrained"] == "artists" and asked[2][1]["minutes"] == 2.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "nan"], "--minutes"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "3", "--steps", "5"], "without --steps"),
        (["--long", "--pretrained", "artists"], "give one of them"),
        (["--pretrained", "artist"], "did you mean"),
        (["--device", "gpu0"], "cannot be used"),
    ],
)
def test_demo_refuses_flags_that_make_no_sense(capsys, tmp_path, flags, said):
    assert said in refused(capsys, "demo", "--out", tmp_path, *flags)


def test_predict_ranks_its_texts(capsys, images, tmp_path):
    out = tmp_path / "answer.json"
    texts = ["a cat", "a dog", "a house"]
    assert main(["predict", "--image", str(images / "red.png"), *TINY, "--out", str(out), "--texts", *texts]) == 0
    shown = capsys.readouterr().out
    answers = json.loads(out.read_text())["answers"]
    assert sorted(answer["text"] for answer in answers) == texts and all(text in shown for text in texts)
    assert [answer["probability"] for answer in answers] == sorted((a["probability"] for a in answers), reverse=True)
    assert sum(answer["probability"] for answer in answers) == pytest.approx(1)


def test_search_writes_a_list_and_a_page_that_needs_nothing_else(capsys, caplog, images, tmp_path):
    out = tmp_path / "found"
    query = '[bold] <b>"fruit"</b>'
    assert main(["search", "--images", str(images), "--query", query, "--out", str(out), "--top", "3", *TINY]) == 0
    hits = json.loads((out / "results.json").read_text())["hits"]
    assert len(hits) == 3 and [hit["score"] for hit in hits] == sorted((h["score"] for h in hits), reverse=True)
    assert {Path(hit["path"]).name for hit in hits} <= {"red.png", "blue.png", "apple.png", "lemon.png"}
    page = (out / "contact_sheet.html").read_text()
    assert page.count("data:image/webp;base64,") == 3 and 'src="http' not in page
    assert "<b>" not in page and "[bold] &lt;b&gt;" in page
    assert query in capsys.readouterr().out and "broken.png" in caplog.text


def test_train_writes_a_run_and_continues_it(pairs, tmp_path, capsys):
    common = ["train", "--train-data", str(pairs), "--batch-size", "2", "--device", "cpu", "--precision", "fp32"]
    common += ["--logs", str(tmp_path), "--name", "run", "--log-every-n-steps", "1"]
    assert main([*common, "--steps", "2"]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    said = capsys.readouterr().out
    assert f"next: florence-fast evaluate zero-shot --pretrained {tmp_path / 'run'} " in said
    params = (tmp_path / "run" / "params.txt").read_text()
    assert "model: florence_nano\n" in params and f"data: {pairs}\n" in params and "commit: " in params
    losses = [json.loads(line)["loss"] for line in (checkpoints / "results.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    capsys.readouterr()
    assert "--resume goes on with it" in refused(capsys, *common, "--steps", "2")
    assert main([*common, "--steps", "2", "--resume", "latest"]) == 0


def test_a_run_that_cannot_be_resumed_is_wrong_usage(pairs, tmp_path, capsys):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    CheckpointStore(checkpoints).save(3, {"format": 1, "counters": {}})
    args = [
        "train",
        "--train-data",
        pairs,
        "--logs",
        tmp_path,
        "--name",
        "run",
        "--resume",
        "latest",
        "--batch-size",
        2,
    ]
    said = refused(capsys, *map(str, args), "--device", "cpu", "--steps", "9")
    assert "cannot go on from" in said and "step_3.pt: it lacks stage, model" in said
    config = tmp_path / "config.json"
    for settings, named in (([1], "must hold an object"), ({"batch_size": "8"}, "batch_size must be a whole number")):
        config.write_text(json.dumps(settings))
        assert named in refused(capsys, "train", "--train-data", str(pairs), "--config", str(config))


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path):
    from florence_fast.cli.train import _folder_of_its_own

    folders = [_folder_of_its_own(tmp_path / "logs" / "date-model") for _ in range(3)]
    assert [folder.name for folder in folders] == ["date-model", "date-model-2", "date-model-3"]
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"status": "stopped", "signal": "SIGINT"}, 130),
        ({"status": "stopped", "signal": "SIGTERM"}, 143),
        ({"status": "stopped", "signal": "SIGHUP"}, 129),
        ({"status": "stopped", "signal": None}, 143),
        ({"status": "finished", "signal": "SIGTERM"}, 0),
        ({"zero_shot": {}}, 0),
    ],
)
def test_only_a_run_that_reached_its_end_exits_with_0(monkeypatch, tmp_path, result, code):
    monkeypatch.setattr("florence_fast.demo.run", lambda *args, **kwargs: result)
    assert main(["demo", "--out", str(tmp_path)]) == code


def test_sigterm_ends_any_command_with_143_and_its_handler_goes_with_it(monkeypatch, capsys):
    cleaned = []

    def wait_for_ever():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("florence_fast.info.collect", wait_for_ever)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["info"]) == 143
    assert cleaned and "terminated" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_goes_away_ends_a_command_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "florence_fast", "info", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_train_flags_set_the_fields_that_they_name(pairs, tmp_path, monkeypatch):
    import florence_fast.train

    seen = {}

    class Recorder:
        def __init__(self, task, run, out_dir, **options):
            seen.update(task=task, config=run, out_dir=out_dir, pairs=len(task.source), **options)

        def run(self, resume=None):
            seen["resume"] = resume
            return {"status": "stopped", "step": 1, "checkpoint": "none", "signal": "SIGINT"}

    monkeypatch.setattr(florence_fast.train, "Trainer", Recorder)
    header, *rows = pairs.read_text().splitlines()
    pairs.write_text("\n".join([header, *rows, *rows]) + "\n")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lr": 0.25, "beta1": 0.5, "batch_size": 7}))
    flags = "--epochs 4 --batch-size 1 --accum-freq 3 --lr 0.125 --wd 0.5 --warmup 1 --workers 0 --save-frequency 2"
    args = ["train", "--train-data", str(pairs), "--config", str(file), "--logs", str(tmp_path), "--name", "n"]
    assert main([*args, "--device", "cpu", "--loss", "clip", "--force-image-size", "32", *flags.split()]) == 130
    config, task = seen["config"], seen["task"].config
    assert (config.batch_size, task.micro_batch_size, config.save_every_steps) == (3, 1, 4)
    assert [(stage.steps, stage.image_size) for stage in config.stages] == [(8, 32)]
    assert (config.lr, config.beta1, config.weight_decay, config.warmup, task.loss) == (0.125, 0.5, 0.5, 1, "clip")
    assert (seen["out_dir"], seen["pairs"], seen["resume"], task.augment) == (tmp_path / "n", 6, None, False)


@pytest.mark.parametrize("name", TASKS)
def test_train_shows_the_defaults_of_the_engine(name):
    import dataclasses
    import inspect

    from florence_fast.cli import train
    from florence_fast.train import RunConfig

    shown = {
        flag: parameter.annotation.__metadata__[0].show_default
        for flag, parameter in inspect.signature(train.command_of(TASKS[name])).parameters.items()
    }
    fields = [*dataclasses.fields(RunConfig), *dataclasses.fields(TASKS[name].settings)]
    no_flags = ("stages", *train.BOARDS)  # --report-to names boards
    defaults = {f.name: str(f.default) for f in fields if f.default not in (None, False) and f.name not in no_flags}
    assert len(shown.keys() & defaults.keys()) > 10
    assert {flag: shown[flag] for flag in defaults} == defaults


@pytest.mark.parametrize("name", TASKS)
def test_every_task_explains_its_flags(name, capsys):
    assert main(["train", name, "--help"]) == 0
    named, unnamed = capsys.readouterr().out, "train --help" if name == "contrastive" else None
    assert "--train-data" in named and "--batch-size" in named and "--wd" in named
    if unnamed:
        assert main(unnamed.split()) == 0
        assert capsys.readouterr().out == named


def test_an_unknown_task_is_refused_with_the_nearest(capsys):
    assert "Did you mean 'contrastive'" in refused(capsys, "train", "contrastve", "--train-data", "x")


def test_evaluate_prints_and_writes_the_same_figures(pairs, tmp_path, capsys):
    for task, keys in (("zero-shot", {"top1", "classes"}), ("retrieval", {"image_to_text", "texts"})):
        out = tmp_path / f"{task}.json"
        assert main(["evaluate", task, "--data", str(pairs), "--out", str(out), *TINY]) == 0
        figures = json.loads(out.read_text())
        assert json.loads(capsys.readouterr().out) == figures
        assert keys <= figures.keys() and figures["images"] == 3 and figures["task"] == task


def test_evaluate_reads_the_columns_that_its_flags_name(pairs, tmp_path, capsys):
    rows = pairs.read_text().replace("filepath\ttitle", "pic\twords").replace("\t", "|")
    (tmp_path / "own.csv").write_text("\ufeff" + rows, encoding="utf-8")
    (tmp_path / "names.txt").write_text(
        "\ufeffa red thing\r\na blue thing\r\na fruit/apple thing\r\n", encoding="utf-8"
    )
    flags = ["--csv-img-key", "pic", "--csv-caption-key", "words", "--csv-separator", "pipe"]
    for task in ("zero-shot", "retrieval"):
        more = ["--classnames", str(tmp_path / "names.txt")] if task == "zero-shot" else []
        assert main(["evaluate", task, "--data", str(tmp_path / "own.csv"), *flags, *more, *TINY]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 3
        shown = refused(capsys, "evaluate", task, "--data", tmp_path / "own.csv", "--csv-separator", ", ")
        assert "separator must be one character" in shown


def test_evaluate_passes_over_as_many_bad_images_as_its_flag_allows(pairs, images, tmp_path, capsys):
    pairs.write_text(pairs.read_text() + f"{images}/broken.png\ta broken thing\n")
    for task in ("zero-shot", "retrieval"):
        command = ["evaluate", task, "--data", str(pairs), *TINY]
        assert main(command) == 1
        assert (
            "1 of 4 pairs cannot be read, more than --max-bad-share allows, max_bad_share=0.01"
            in capsys.readouterr().err
        )
        assert main([*command, "--max-bad-share", "0.25"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 3


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_escaped(images, tmp_path, monkeypatch, encoding):
    name = "größe\x1b[2J" + os.fsdecode(b"\xe9")
    (images / "red.png").rename(images / f"{name}.png")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, errors="strict"))
    out = tmp_path / name
    assert main(["search", "--images", str(images), "--query", f"red {name}", "--out", str(out), *TINY]) == 0
    sys.stdout.flush()
    assert b"\x1b" not in shown.getvalue() and rb"\x1b[2J\xe9" in shown.getvalue()
    hits = json.loads((out / "results.json").read_text(encoding="utf-8"))["hits"]
    assert str(images / f"{name}.png") in [hit["path"] for hit in hits]


def test_info_lists_versions_variables_and_reasons(capsys, monkeypatch):
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "reference")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"name": "florence_fast", "version": __version__} in facts["versions"]
    (ours,) = [row for row in facts["environment"] if row["variable"] == "FLORENCE_FAST_BACKEND"]
    assert ours["value"] == "reference"
    used = {row["op"]: row["backend"] for row in facts["ops"] if row["here"] == ["used here"]}
    from florence_fast.ops import OPS

    assert used == dict.fromkeys(OPS, "reference")
    assert all(row["here"] for row in facts["ops"])
    assert main(["info"]) == 0
    assert "window_attention" in capsys.readouterr().out
    monkeypatch.setenv("FLORENCE_FAST_BACKEND", "tritn")
    assert "did you mean 'triton'" in refused(capsys, "info")


def test_every_variable_that_the_source_reads_is_in_the_table_and_the_reverse():
    import re

    from florence_fast import env

    package = Path(env.__file__).parent
    texts = {p: p.read_text() for p in package.rglob("*.py") if p != Path(env.__file__)}
    read = {name for text in texts.values() for name in re.findall(r"FLORENCE_FAST_[A-Z_]+", text)}
    assert read == {variable.name for variable in env.VARIABLES}


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left"), 1, "No space left"),
        (BadDataError("3 of 4"), 1, "failed: 3 of 4"),
    ],
    ids=["ctrl-c", "disk-full", "ours"],
)
def test_interruption_and_failure_have_their_own_exit_codes(raised, code, said, monkeypatch, capsys):
    def fail():
        raise raised

    monkeypatch.setattr("florence_fast.info.collect", fail)
    assert main(["info"]) == code
    assert said in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback():
    code = "from florence_fast import info, cli; import sys; info.collect = lambda: 1 / 0; sys.exit(cli.main(['info']))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 1 and "ZeroDivisionError" in shown.stderr and "Traceback" in shown.stderr
