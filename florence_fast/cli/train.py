"""``florence-fast train``: contrastive pretraining on pictures with texts, with open_clip's names for its flags.

A flag of the engine is a parameter named as the field of ``TrainConfig`` that it sets. It has no default of its own:
what is not given keeps the value that the file of ``--config``, or else ``TrainConfig``, says.
"""

import dataclasses
import itertools
import os
import shlex
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florence_fast.checks import whole
from florence_fast.cli.outputs import check_out_folder
from florence_fast.cli.table_flags import CsvCaptionKey, CsvImgKey, CsvSeparator
from florence_fast.cli.usage import (
    PRECISION_HELP,
    Model,
    WrongUsage,
    exit_if_interrupted,
    load,
    pick_device,
    refusals_as_wrong_usage,
    refuse_earlier_run,
    say,
)
from florence_fast.text_files import read_json

if TYPE_CHECKING:
    from florence_fast.models import FlorenceConfig
    from florence_fast.train import TrainConfig

DEFAULT_EPOCHS = 32


def _flag(default: object, *names: str, **settings: Any) -> Any:
    """An option that is shown with the default of ``TrainConfig`` but is None when it is not given."""
    return typer.Option(*names, show_default=str(default), **settings)


def command(
    context: typer.Context,
    train_data: Annotated[
        str, typer.Option(help="CSV, TSV, JSONL or Parquet file, folder, or WebDataset tars ('{000..010}', '*').")
    ],
    csv_img_key: CsvImgKey = "filepath",
    csv_caption_key: CsvCaptionKey = "title",
    csv_separator: CsvSeparator = None,
    model: Model = "florence_nano",
    pretrained: Annotated[
        str | None, typer.Option(help="Start from weights: a tag, a folder (of a run, too) or a file.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", "--force-image-size", min=4, help="Side of the pictures in pixels."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help=f"Length in passes [default: {DEFAULT_EPOCHS}].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length in steps, in place of --epochs.")] = None,
    config: Annotated[Path | None, typer.Option(help="TrainConfig as JSON, stages too; given flags win.")] = None,
    batch_size: Annotated[int | None, _flag(512, min=1, help="Pairs that a process encodes at once.")] = None,
    accum_freq: Annotated[int, typer.Option(min=1, help="Batches joined in one loss (gradient cache).")] = 1,
    lr: Annotated[float | None, _flag(0.0005, help="Peak of the learning rate.")] = None,
    weight_decay: Annotated[float | None, _flag(0.1, "--wd", help="Weight decay of matrices.")] = None,
    beta1: Annotated[float | None, _flag(0.9, help="Of AdamW.")] = None,
    beta2: Annotated[float | None, _flag(0.98, help="Of AdamW.")] = None,
    eps: Annotated[float | None, _flag(1e-06, help="Of AdamW.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up.", show_default="a twentieth")] = None,
    grad_clip_norm: Annotated[float | None, _flag(1.0, help="Largest gradient norm.")] = None,
    loss: Annotated[str | None, _flag("unicl", help="unicl (equal texts are positives) or clip.")] = None,
    precision: Annotated[str | None, _flag("auto", help=PRECISION_HELP)] = None,
    grad_checkpointing: Annotated[
        bool | None, typer.Option("--grad-checkpointing", help="Trade time for memory.")
    ] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Also keep a moving average of the weights.")] = None,
    num_workers: Annotated[int | None, _flag(0, "--workers", min=0, help="Processes that decode.")] = None,
    worker_timeout: Annotated[
        float | None, _flag(300.0, help="Seconds without a decoded sample after which the workers count as stuck.")
    ] = None,
    crop: Annotated[
        str | None,
        _flag("the model's", help="Of each image: shortest (its middle), longest, squash or random_resized."),
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Turn, shear and recolour the pictures.")] = False,
    max_bad_share: Annotated[float | None, _flag(0.01, help="Share of unreadable pairs that stops it.")] = None,
    max_skipped_steps: Annotated[int | None, _flag(20, min=0, help="NaN steps in a row that stop it.")] = None,
    seed: Annotated[int | None, _flag(0, min=0, max=2**63 - 1, help="Of weights, order and augmentation.")] = None,
    save_frequency: Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")] = None,
    keep_checkpoints: Annotated[int | None, _flag(3, min=1, help="How many checkpoints stay.")] = None,
    log_every_n_steps: Annotated[int | None, _flag(10, min=1, help="Steps between lines of the log.")] = None,
    logs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("logs"),
    name: Annotated[
        str | None, typer.Option(help="Folder of this run in --logs.", show_default="date and model")
    ] = None,
    resume: Annotated[str | None, typer.Option(help="'latest', or a checkpoint, to continue from.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="a GPU if any")] = None,
) -> None:
    """Pretrain a model on pictures with texts.

    Under torchrun it trains on several processes. Checkpoints, results.jsonl and the log lie in --logs/--name.
    """
    import torch

    from florence_fast.data import BatchAugment, open_pairs
    from florence_fast.provenance import provenance
    from florence_fast.train import ResumeError, TrainConfig, Trainer, init_distributed
    from florence_fast.train.distributed import rank, world_size

    with refusals_as_wrong_usage():
        own_size = _dual_encoder(model).image.img_size
        image_size = image_size or own_size
        folder = _run_folder(logs, name, model, resume)
        check_out_folder("--logs", folder)
        device = pick_device(device) if device else str(init_distributed())
        source = open_pairs(train_data, img_key=csv_img_key, caption_key=csv_caption_key, separator=csv_separator)
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {key: value for key, value in context.params.items() if key in fields and value is not None}
        run = _config(config, given, image_size, epochs, steps, accum_freq, save_frequency, len(source), world_size())

    torch.manual_seed(run.seed)
    net, tokenizer = load(model, None if pretrained == "none" else pretrained, device)
    pixels = BatchAugment(net.config.image_mean, net.config.image_std) if augment else None
    about = {"command": provenance()["command"], "model": model, "pretrained": pretrained, "data": train_data}
    with refusals_as_wrong_usage():
        folder = folder if name else _folder_of_its_own(folder)
        trainer = Trainer(net, tokenizer, source, run, folder, augment=pixels, about=about)
    try:
        result = trainer.run(resume=resume)
    except ResumeError as error:
        raise WrongUsage(" ".join(str(error).split())) from error
    if rank() == 0:
        say(f"{result['status']} at step {result['step']} of {run.total_steps}: {result['checkpoint']}")
        say(_next_command(result["status"], about["command"], folder, model, name, resume))
    exit_if_interrupted(result)


def _next_command(status: str, command: str, folder: Path, model: str, name: str | None, resume: str | None) -> str:
    """What is likely to be typed next: the command that goes on with a stopped run, or those that use its weights."""
    if status == "stopped":
        more = [] if name else ["--name", folder.name]
        return f"to go on: {command} {shlex.join([*more, *([] if resume == 'latest' else ['--resume', 'latest'])])}"
    weights = shlex.join(["--model", model, "--pretrained", str(folder)])
    return (
        f"next: florence-fast evaluate zero-shot {weights} --data PAIRS\n"
        f"      florence-fast predict {weights} --image IMAGE --texts TEXT TEXT"
    )


def _folder_of_its_own(folder: Path) -> Path:
    """Make the folder of a run that was given no name; runs that start in the same second get a number."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        own = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            own.mkdir()
            return own


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


def _dual_encoder(model: str) -> "FlorenceConfig":
    """The configuration of the model that is trained.

    Raises:
        ValueError: it has no text tower.
    """
    from florence_fast.models import FlorenceConfig
    from florence_fast.models.factory import model_config

    config = model_config(model)
    if not isinstance(config, FlorenceConfig):
        raise ValueError(f"{model} is an image tower: contrastive training takes a dual encoder, as florence_nano")
    return config


def _config(
    file: Path | None,
    given: dict[str, Any],
    image_size: int,
    epochs: int | None,
    steps: int | None,
    accum_freq: int,
    save_frequency: int | None,
    num_pairs: int,
    num_processes: int,
) -> "TrainConfig":
    """Join the file's settings, the given flags, and what follows from epochs and accumulation."""
    from florence_fast.train import TrainConfig

    settings = read_json(file) if file else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold an object with TrainConfig's settings, got {type(settings).__name__}")
    if epochs and steps:
        raise WrongUsage("--epochs and --steps are two ways to say one length: give one of them")
    if "stages" in settings and (epochs or steps):
        raise WrongUsage(f"the stages of {file} say how long the run is: leave out --epochs and --steps")
    settings = {**settings, **given}
    at_once = whole("batch_size", settings.get("batch_size", TrainConfig.batch_size))
    if accum_freq > 1:
        settings |= {"batch_size": at_once * accum_freq, "micro_batch_size": at_once}
    steps_per_epoch = max(1, num_pairs // (at_once * accum_freq * num_processes))
    if save_frequency:
        settings["save_every_steps"] = save_frequency * steps_per_epoch
    length = steps or (epochs or DEFAULT_EPOCHS) * steps_per_epoch
    return TrainConfig.from_dict({"stages": [{"steps": length, "image_size": image_size}], **settings})
