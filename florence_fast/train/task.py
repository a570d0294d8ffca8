"""The contract between a training objective and the engine: batches, a loss, logged values, metadata, evaluators.

One file of `florence_fast.tasks` is one task. A task contains no loop and no checkpoint code: steps, stages,
precision, clipping, skipping, checkpoints, resume and signals belong to the engine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.distributed import mean_over_ranks
from florence_fast.train.optim import parameter_groups
from florence_fast.train.settings import Settings

Autocast = Callable[[], AbstractContextManager[Any]]


class Batch(Protocol):
    """The samples of one step and rank."""

    @property
    def skipped(self) -> int:
        """How many of them stand in for an unreadable sample."""
        ...

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """Name the first samples, for messages."""
        ...


class Evaluator(Protocol):
    """Measures a model."""

    def run(self, model: nn.Module) -> Mapping[str, Any]:
        """Return figures by name. The model is in eval mode; every rank makes the same call."""
        ...


@dataclass(frozen=True)
class Inputs(Settings):
    """What a command names for a task: model and data. Its fields are flags, as those of the settings are.

    Args:
        train_data: what is trained on.
        model: name or folder of the model; an unknown name lists those that there are.
        pretrained: start from weights: a tag, a folder (of a run, too), a file, or none.
    """

    train_data: str
    model: str
    pretrained: str | None = None

    def image_size(self) -> int:
        """Return the side of the images that the model was made for. Raises ValueError where the model does not fit."""
        raise NotImplementedError

    def open(self) -> Any:
        """Open the training data, which has a length. Raises ValueError or FileNotFoundError where it cannot."""
        raise NotImplementedError

    def create(self, source: Any, settings: Any, device: str) -> "Task":
        """Build the model and the task on what `open` returned; torch's generators have been seeded."""
        raise NotImplementedError

    def next_commands(self, folder: Path) -> Sequence[str]:
        """Return commands that use the weights of the run in ``folder``."""
        return ()


class Task:
    """One training objective. A subclass implements at least `batches` and `loss`.

    Args:
        model: what is trained, saved and loaded, on its device.
        config: the task's own settings.

    Attributes:
        name: the word of the command line, the key in TASKS.
        settings: the class of ``config``.
        inputs: the class of what a command names for this task.
        module: ``model``, wrapped for several processes; the engine sets it, and `loss` calls it.
        run: the run's settings; the engine sets it, with the precision that is in force.
        epoch_size: samples of one pass over the data.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Settings]] = Settings
    inputs: ClassVar[type[Inputs]] = Inputs
    epoch_size: int
    run: RunConfig

    def __init__(self, model: nn.Module, config: Settings | None = None) -> None:
        self.model = self.module = model
        self.config = self.settings() if config is None else config
        self.device = next(model.parameters()).device

    def setup(self, run: RunConfig) -> None:
        """Prepare for a run: called once, after the weights were cast and before the model is wrapped."""
        self.run = run

    def batches(self, stage: Stage, batch_size: int, position: int, stopping: Callable[[], bool]) -> Iterator[Any]:
        """Return this rank's batches without end.

        Args:
            stage: what the batches are for.
            batch_size: samples of one rank.
            position: samples that all ranks together have consumed before.
            stopping: whether the run was asked to stop, so that whoever waits for data need not wait long.
        """
        raise NotImplementedError

    def loss(self, batch: Any, stage: Stage, step: int) -> Tensor:
        """Return the mean loss of this rank's batch, 0-D, with its graph."""
        raise NotImplementedError

    def backward(
        self, batch: Any, stage: Stage, step: int, scale: Callable[[Tensor], Tensor], autocast: Autocast
    ) -> Tensor:
        """Leave the gradients of the loss on the parameters.

        Args:
            batch, stage, step: as for `loss`.
            scale: multiplies the loss before the backward pass (fp16).
            autocast: returns the autocast region of the run's precision.

        Returns:
            The loss of the joined batch of all ranks: 0-D, without a graph, still on the device.
        """
        with autocast():
            loss = self.loss(batch, stage, step)
        scale(loss).backward()
        return mean_over_ranks(loss.detach())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups: "names", "decay" (whether weights decay), "lr_factor" (1 where absent)."""
        return parameter_groups(self.model)

    def enter_stage(self, stages: Sequence[Stage]) -> None:
        """Prepare for the last of ``stages``, which are all up to now; may replace parameters of the model."""

    def after_update(self) -> None:
        """Do what follows every update of the weights."""

    def scalars(self) -> Mapping[str, float]:
        """Return what every interval logs besides the loss."""
        return {}

    def metadata(self) -> Mapping[str, str]:
        """Return what the header of the weights file says, so that the file can be used alone."""
        return {"florence_fast_task": self.name}

    def evaluators(self) -> Sequence[Evaluator]:
        """Return what measures the model at intervals and at the end."""
        return ()

    def describe_data(self) -> Mapping[str, Any]:
        """Return what the data of two ranks, or of a run and its checkpoint, must agree on."""
        return {"samples": self.epoch_size}
