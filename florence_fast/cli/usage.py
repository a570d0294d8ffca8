"""Shared by the commands: refusals become wrong usage, and a model is loaded with its tokenizer."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from florence_fast.errors import did_you_mean
from florence_fast.precision import PRECISIONS

if TYPE_CHECKING:
    import torch

    from florence_fast.models import Florence

PRECISION_HELP = "auto (bf16 where the device is fast at it), fp32, amp_bf16, amp (fp16); of weights: bf16, fp16."
REFUSALS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError)


def one_of(*known: str) -> Callable[[str], str]:
    """Return an option's callback that lets only ``known`` words through."""

    def check(word: str) -> str:
        if word not in known:
            raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}{did_you_mean(word, known)}")
        return word

    return check


Model = Annotated[
    str, typer.Option("--model", help="Name or folder of the model; an unknown name lists those that there are.")
]
DEFAULT_MODEL = "florence_nano"
ModelOfWeights = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Name or folder of the model; an unknown name lists those that there are.",
        show_default=f"that of a folder or file as --pretrained, or else {DEFAULT_MODEL}",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the random draws.")]
Pretrained = Annotated[
    str | None,
    typer.Option(
        "--pretrained",
        help="Weights: a tag, a folder (of a run, too), a file, or 'none'.",
        show_default="the model's first tag",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:1; by default a GPU if there is one.")]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        callback=one_of(*PRECISIONS),
        help=PRECISION_HELP,
    ),
]
ResizeMode = Annotated[
    str | None,
    typer.Option(
        "--image-resize-mode",
        help="shortest (the middle of an image), longest (all of it, on a canvas) or squash (stretched).",
        show_default="as trained",
    ),
]


def _share(value: float) -> float:
    if not 0 <= value <= 1:  # the parser's own bounds let NaN through
        raise typer.BadParameter(f"{value} must lie in [0, 1]")
    return value


MaxBadShare = Annotated[
    float,
    typer.Option(
        "--max-bad-share", callback=_share, help="Share of unreadable images or texts above which the command fails."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images or texts in one forward pass.")]


class WrongUsage(Exception):
    """The command cannot be carried out as it was asked; the message says why, in one line."""


@contextmanager
def refusals_as_wrong_usage() -> Iterator[None]:
    """Turn the errors with which our functions refuse their arguments into ``WrongUsage``.

    It is put around the checks at a command's start and never around its work, whose errors are failures.
    """
    try:
        yield
    except REFUSALS as error:
        raise WrongUsage(" ".join(str(error).split())) from error


def refuse_earlier_run(folder: Path) -> None:
    """Refuse to start a new run in a folder that holds checkpoints of another."""
    if any(folder.glob("checkpoints/step_*.pt")):
        raise WrongUsage(f"{folder} holds a run already: --resume goes on with it, another folder starts anew")


def exit_if_interrupted(result: dict[str, Any]) -> None:
    """Leave with the exit code of the signal that stopped a run before its end, so that no script takes it for done.

    That is 130 after SIGINT, 143 after SIGTERM, also where another rank was the one to receive it, 129 after SIGHUP.
    """
    if result.get("status") == "stopped":
        raise typer.Exit(128 + signal.Signals[result["signal"] or "SIGTERM"])


def say(text: str) -> None:
    """Print a line for whoever still reads: a run that is done does not fail for want of a reader."""
    with suppress(OSError):
        print(text, flush=True)


def load(
    model: str, pretrained: str | None, device: str | None, precision: str = "fp32", resize_mode: str | None = None
) -> tuple["Florence", Any]:
    """Create a dual encoder on its device, with its tokenizer; a name, tag or device that is not there is wrong usage.

    ``model`` and ``pretrained`` are what `weights_of` returns.
    """
    import florence_fast as ff

    with refusals_as_wrong_usage():
        tokenizer = ff.get_tokenizer(model)
        options: dict[str, Any] = {"image_resize_mode": resize_mode} if resize_mode else {}
        net = ff.create_model(model, pretrained=pretrained, precision=precision, device=pick_device(device), **options)
        return net, tokenizer


class Weights(NamedTuple):
    """A model and its weights, as `create_model` takes them."""

    model: str
    pretrained: str | None


def weights_of(model: str | None, pretrained: str | None, note: bool = False) -> Weights:
    """Return what ``--model`` and ``--pretrained`` mean together.

    A model that is not named is the one that a folder or file of weights is of, or else `DEFAULT_MODEL`. Weights that
    are not named are the model's own, or those of its first tag; 'none' means drawn ones.

    Args:
        model: the value of ``--model``.
        pretrained: the value of ``--pretrained``.
        note: say on stderr what the shipped weights were trained on.

    Raises:
        WrongUsage: the model is not known, or comes without weights and none are given.
    """
    from florence_fast.models import list_pretrained
    from florence_fast.models.factory import local_path, model_config, model_of_weights

    if model is None:
        with refusals_as_wrong_usage():
            model = model_of_weights(pretrained) or DEFAULT_MODEL
    if pretrained is None:
        with refusals_as_wrong_usage():
            model_config(model)
        if local_path(model) is not None:
            return Weights(model, None)
        tags = [tag for name, tag in list_pretrained() if name == model]
        if not tags:
            raise WrongUsage(f"{model} comes without weights: give --pretrained a file, or 'none' for random ones")
        pretrained = tags[0]
    if note and (model, pretrained) in list_pretrained():
        print(f"note: the weights {pretrained!r} were trained on emoji, not on photographs", file=sys.stderr)
    return Weights(model, None if pretrained == "none" else pretrained)


def settle_precision(word: str, device: "str | torch.device") -> str:
    """Return the precision that ``word`` means on a device, after saying on stderr what was chosen and why."""
    from florence_fast.precision import choose_precision, resolve_precision

    choice = choose_precision(word, device)
    if choice.precision != word:
        print(choice, file=sys.stderr)
    return resolve_precision(word, device)


def pick_device(name: str | None) -> str:
    """Return ``name``, or the GPU if there is one, after looking that it can be used.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name
