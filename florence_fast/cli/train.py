"""``florence-fast train TASK``: one command for every task, contrastive pretraining where none is named.

Flags of the engine and of a task are generated from their dataclasses, with open_clip's names where they mean the
same. What is not given keeps the value that the file of ``--config``, or else the dataclass, says.
"""

import dataclasses
import itertools
import os
import shlex
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from florence_fast.checks import whole
from florence_fast.cli.outputs import check_out_folder
from florence_fast.cli.settings_flags import fields_in, flags_of, keyword, with_flags
from florence_fast.cli.usage import (
    WrongUsage,
    exit_if_interrupted,
    one_of,
    pick_device,
    refusals_as_wrong_usage,
    refuse_earlier_run,
    say,
)
from florence_fast.text_files import read_json

if TYPE_CHECKING:
    from florence_fast.train.config import RunConfig
    from florence_fast.train.settings import Settings
    from florence_fast.train.task import Inputs, Task

DEFAULT_TASK = "contrastive"
DEFAULT_EPOCHS = 32
BOARDS = ("tensorboard", "wandb")


def _boards(words: str | None) -> str | None:
    """Let only names of boards through, joined by commas."""
    for word in (words or "none").split(","):
        one_of(*BOARDS, "none")(word)
    return words


class Length(NamedTuple):
    """What follows from the number of samples: how long a run is, and how much of it lies between checkpoints."""

    image_size: int | None
    epochs: int | None
    steps: int | None
    save_frequency: int | None
    val_frequency: int | None
    accum_freq: int


class Wanted(NamedTuple):
    """Settings as they were asked for."""

    file: Path | None
    given: dict[str, Any]
    length: Length


class Place(NamedTuple):
    """Where a run lies and is computed."""

    logs: Path
    name: str | None
    resume: str | None
    device: str | None


class TaskGroup(TyperGroup):
    """One command a task, made when it is asked for: tasks need torch, which ``florence-fast --help`` does without."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take flags without a task as those of contrastive pretraining."""
        if not args or args[0].startswith("-"):
            args = [DEFAULT_TASK, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all tasks."""
        return list(self._load())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a task."""
        return self._load().get(cmd_name)

    def _load(self) -> MutableMapping[str, Any]:
        from florence_fast.tasks import TASKS

        for name, task in TASKS.items():
            if name not in self.commands:
                made = typer.Typer(add_completion=False, rich_markup_mode=None)
                made.command(name)(command_of(task))
                self.commands[name] = typer.main.get_command(made)
        return self.commands


commands = typer.Typer(cls=TaskGroup, help="Train a model: pretraining, or another task.")


@commands.callback()
def _root() -> None: ...


def command_of(task: "type[Task]") -> Callable[..., None]:
    """Return the function that trains ``task``, with a parameter for every flag."""
    from florence_fast.tasks import TASKS
    from florence_fast.train.config import RunConfig

    def train(
        given: dict[str, Any],
        image_size: Annotated[
            int | None,
            typer.Option("--image-size", "--force-image-size", min=4, help="Side of the images in pixels."),
        ] = None,
        epochs: Annotated[
            int | None, typer.Option(min=1, help=f"Length in passes [default: {DEFAULT_EPOCHS}].")
        ] = None,
        steps: Annotated[int | None, typer.Option(min=1, help="Length in steps, in place of --epochs.")] = None,
        config: Annotated[Path | None, typer.Option(help="Settings as JSON, stages too; given flags win.")] = None,
        save_frequency: Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")] = None,
        val_frequency: Annotated[
            int | None,
            typer.Option("--val-frequency", "--zeroshot-frequency", min=1, help="Epochs between evaluations."),
        ] = None,
        report_to: Annotated[
            str | None,
            typer.Option(
                callback=_boards, help="tensorboard, wandb, both with a comma, or none.", show_default="tensorboard"
            ),
        ] = None,
        logs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("logs"),
        name: Annotated[
            str | None, typer.Option(help="Folder of this run in --logs.", show_default="date and model")
        ] = None,
        resume: Annotated[str | None, typer.Option(help="'latest', or a checkpoint, to continue from.")] = None,
        device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="a GPU if any")] = None,
    ) -> None:
        inputs = task.inputs(**fields_in(task.inputs, given))
        if "model" not in given:
            inputs = _of_its_weights(inputs)
        length = Length(image_size, epochs, steps, save_frequency, val_frequency, given.pop("accum_freq", 1))
        if report_to is not None:
            given |= {board: board in report_to.split(",") for board in BOARDS}
        place = Place(logs, name, resume, device)
        _train(task, inputs, Wanted(config, given, length), place)

    others = ", ".join(name for name in TASKS if name != task.name)
    train.__doc__ = (
        f"{(task.__doc__ or task.name).splitlines()[0]}\n\n"
        "Under torchrun it trains on several processes. Checkpoints, results.jsonl and the log lie in --logs/--name."
        + (f"\n\nOther tasks: florence-fast train {others} --help." if others else "")
    )
    flags = [*flags_of(task.inputs), *flags_of(RunConfig, without=BOARDS), *flags_of(task.settings)]
    if "micro_batch_size" in task.settings.__dataclass_fields__:
        help = "Batches joined in one loss (gradient cache)."
        flags.append(keyword("accum_freq", int | None, typer.Option(min=1, show_default="1", help=help)))
    return with_flags(train, flags)


def _of_its_weights(inputs: "Inputs") -> "Inputs":
    """Take the model that the weights are of, where they say so: a run's folder as --pretrained names it too."""
    from florence_fast.models.factory import model_of_weights

    with refusals_as_wrong_usage():
        model = model_of_weights(inputs.pretrained)
    return inputs if model is None else dataclasses.replace(inputs, model=model)


def _train(task: "type[Task]", inputs: "Inputs", wanted: Wanted, place: Place) -> None:
    """Check everything that was asked for, build the task, train, and say what may be typed next."""
    import torch

    from florence_fast.provenance import provenance
    from florence_fast.train import ResumeError, Trainer, init_distributed
    from florence_fast.train.distributed import rank, world_size

    name, resume = place.name, place.resume
    with refusals_as_wrong_usage():
        own_size = inputs.image_size()
        folder = _run_folder(place.logs, name, inputs.model, resume)
        check_out_folder("--logs", folder)
        device = pick_device(place.device) if place.device else str(init_distributed())
        source = inputs.open()
        run, settings = _settings(task, wanted, own_size, len(source), world_size())
        torch.manual_seed(run.seed)
        made = inputs.create(source, settings, device)
        about = {**inputs.to_dict(), "command": provenance()["command"], "data": inputs.train_data}
        folder = folder if name else _folder_of_its_own(folder)
        trainer = Trainer(made, run, folder, about=about)
    try:
        result = trainer.run(resume=resume)
    except ResumeError as error:
        raise WrongUsage(" ".join(str(error).split())) from error
    if rank() == 0:
        say(f"{result['status']} at step {result['step']} of {run.total_steps}: {result['checkpoint']}")
        if following := _next_command(result["status"], about["command"], folder, inputs, place):
            say(following)
    exit_if_interrupted(result)


def _settings(
    task: "type[Task]", wanted: Wanted, image_size: int, num_samples: int, num_processes: int
) -> "tuple[RunConfig, Settings]":
    """Join the file's settings, the given flags, and what follows from epochs and accumulation."""
    from florence_fast.train.config import RunConfig, split_settings

    file, given, length = wanted
    written = read_json(file) if file else {}
    if not isinstance(written, dict):
        raise ValueError(f"{file} must hold an object with RunConfig's settings, got {type(written).__name__}")
    if length.epochs and length.steps:
        raise WrongUsage("--epochs and --steps are two ways to say one length: give one of them")
    if "stages" in written and (length.epochs or length.steps):
        raise WrongUsage(f"the stages of {file} say how long the run is: leave out --epochs and --steps")
    run, own = split_settings(written, task.settings)
    run |= fields_in(RunConfig, given)
    own |= fields_in(task.settings, given)
    at_once = whole("batch_size", run.get("batch_size", RunConfig.batch_size))
    if length.accum_freq > 1:
        run["batch_size"], own["micro_batch_size"] = at_once * length.accum_freq, at_once
    steps_per_epoch = max(1, num_samples // (at_once * length.accum_freq * num_processes))
    if length.save_frequency:
        run["save_every_steps"] = length.save_frequency * steps_per_epoch
    if length.val_frequency:
        run["evaluate_every_steps"] = length.val_frequency * steps_per_epoch
    steps = length.steps or (length.epochs or DEFAULT_EPOCHS) * steps_per_epoch
    stages = [{"steps": steps, "image_size": length.image_size or image_size}]
    return RunConfig.from_dict({"stages": stages, **run}), task.settings.from_dict(own)


def _next_command(status: str, command: str, folder: Path, inputs: "Inputs", place: Place) -> str:
    """What is likely to be typed next: the command that goes on with a stopped run, or those that use its weights."""
    if status == "stopped":
        more = [] if place.name else ["--name", folder.name]
        resume = [] if place.resume == "latest" else ["--resume", "latest"]
        return f"to go on: {command} {shlex.join([*more, *resume])}"
    following = inputs.next_commands(folder)
    return f"next: {following[0]}" + "".join(f"\n      {line}" for line in following[1:]) if following else ""


def _folder_of_its_own(folder: Path) -> Path:
    """Make the folder of a run that was given no name; runs that start in the same second get a number."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        own = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            own.mkdir()
            return own
    raise AssertionError("counting does not end")


def _run_folder(logs: Path, name: str | None, model: str, resume: str | None) -> Path:
    """The folder of this run, refused when a run that is not to be continued lies there."""
    if name is None and (resume == "latest" or "RANK" in os.environ):
        raise ValueError("--name is needed with --resume latest and under torchrun, to say which run it is")
    folder = logs / (name or f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{Path(model).name}")
    if resume is None:
        refuse_earlier_run(folder)
    if resume not in (None, "latest") and not Path(resume).is_file():
        raise FileNotFoundError(f"no such checkpoint: {resume}")
    return folder
