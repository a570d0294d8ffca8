"""Configuration of a run: the paper's stages and the engine's settings. Each task has a dataclass of its own.

Section 2.2 of the paper trains in stages: on augmented texts, then without them, then at high resolution. A stage is
a row here and nothing else, so a schedule can be read, stored in a checkpoint and compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from florence_fast.errors import require_count, require_number
from florence_fast.precision import PRECISIONS
from florence_fast.train.settings import Settings, count, number, refuse_unknown_keys, require_bool, word

LR_SCHEDULERS = ("cosine", "constant", "const", "wsd", "const-cooldown")
SMALLEST_EPS = 2.0**-126
"""The smallest normal number of fp32: a smaller `eps` may be 0 there, and AdamW divides 0 by it."""


@dataclass(frozen=True)
class Stage:
    """One stretch of a run: how many steps, on which images, with which texts.

    Args:
        steps: optimiser steps of this stage.
        image_size: side of the square images, in pixels.
        augment_text: draw keywords, short names and templates in place of the plain text, where a task reads texts.
        batch_size: samples a step and process; None takes the run's.
        window_size: attention window of the image tower from this stage on; None leaves it as it is.
        peak_lr: height of the schedule during this stage; None takes the run's `lr`.
    """

    steps: int
    image_size: int
    augment_text: bool = True
    batch_size: int | None = None
    window_size: int | None = None
    peak_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "image_size", "batch_size", "window_size"):
            value = getattr(self, name)
            if value is not None:
                require_count(f"Stage.{name}", value, at_least=1)
        if self.peak_lr is not None:
            require_number("Stage.peak_lr", self.peak_lr, "be a positive number", lambda lr: lr > 0)
        require_bool("Stage.augment_text", self.augment_text)


PAPER_STAGES = (
    Stage(steps=1_000_000, image_size=224, augment_text=True),
    Stage(steps=180_000, image_size=224, augment_text=False),
    Stage(steps=80_000, image_size=384, augment_text=False, window_size=12),
)
"""The paper's schedule at its global batch of 24,576 (window 12 at 384 pixels is inferred from its published costs)."""


def paper_stages(total_steps: int) -> tuple[Stage, ...]:
    """Shrink the paper's schedule to ``total_steps``, keeping the shares of its three stages.

    Args:
        total_steps: steps of the whole run, at least 3.

    Returns:
        Three stages whose steps add up to ``total_steps``.

    Raises:
        ValueError: ``total_steps`` is less than one step a stage.

    >>> [stage.steps for stage in paper_stages(1260)]
    [1000, 180, 80]
    """
    require_count("total_steps", total_steps, at_least=len(PAPER_STAGES))
    whole = sum(stage.steps for stage in PAPER_STAGES)
    later = [max(1, round(total_steps * stage.steps / whole)) for stage in PAPER_STAGES[1:]]
    return tuple(
        Stage(**{**asdict(stage), "steps": steps})
        for stage, steps in zip(PAPER_STAGES, [total_steps - sum(later), *later], strict=True)
    )


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that a run of any task is determined by, apart from its model, its data and the task's own settings.

    Args:
        stages: what is trained on, in order.
        batch_size: samples a step and process.
        seed: of the data order, the augmentation and drop path.
        lr: peak of the learning rate.
        min_lr: the value that the schedule ends at, where it falls.
        lr_scheduler: cosine (over the whole run), constant (or const), or wsd (or const-cooldown): constant, then a
            straight line to min_lr.
        warmup: steps of linear warm-up; None takes a twentieth of the run.
        cooldown: steps of the line that wsd ends with; None takes a fifth of the run.
        weight_decay: of matrices and convolutions; biases, norms, tables and embeddings have none.
        beta1, beta2, eps: of AdamW.
        grad_clip_norm: largest gradient norm; None leaves gradients alone.
        precision: auto (bf16 autocast where the device is fast at it), fp32, amp_bf16, amp (fp16); of weights: bf16,
            fp16, pure_bf16, pure_fp16. A run records what "auto" meant on its device.
        grad_checkpointing: recompute activations in the backward pass, which trades time for memory.
        torchcompile: compile the model with torch.compile.
        ema_decay: keep a moving average of the weights; None keeps none.
        max_skipped_steps: steps in a row that may be skipped for NaN or Inf before the run is stopped.
        deterministic: use torch's deterministic algorithms; None does so on a CPU.
        num_workers: processes that decode samples; 0 decodes in the training process.
        worker_timeout: seconds without a decoded sample after which the workers count as stuck.
        max_bad_share: share of unreadable samples above which the run is stopped.
        log_every_n_steps: length of an interval: one line, one record, one call of `on_interval`.
        save_every_steps: steps between checkpoints; None saves at the end, before evaluations and on a signal only.
        evaluate_every_steps: steps between evaluations by the task; None evaluates at the end only.
        keep_checkpoints: how many valid checkpoints stay.
        progress: show a bar and the log lines in the terminal.
        tensorboard: write event files where TensorBoard is installed.
        wandb: report to Weights & Biases, which must be installed.
    """

    stages: tuple[Stage, ...]
    batch_size: int = count(512)
    seed: int = count(0, at_least=0, at_most=1 << 62)
    lr: float = number(5e-4, "be a positive number", lambda x: x > 0)
    min_lr: float = number(0.0, "be a number")
    lr_scheduler: str = word("cosine", LR_SCHEDULERS)
    warmup: int | None = count(None, at_least=0)
    cooldown: int | None = count(None, at_least=0)
    weight_decay: float = number(0.1, "be a number and not negative", lambda x: x >= 0)
    beta1: float = number(0.9, "lie in [0, 1)", lambda x: 0 <= x < 1)
    beta2: float = number(0.98, "lie in [0, 1)", lambda x: 0 <= x < 1)
    eps: float = number(
        1e-6, f"be a number of at least {SMALLEST_EPS:.3g}, the smallest of fp32", lambda x: x >= SMALLEST_EPS
    )
    grad_clip_norm: float | None = number(1.0, "be positive or None", lambda x: x > 0)
    precision: str = word("auto", PRECISIONS)
    grad_checkpointing: bool = False
    torchcompile: bool = False
    ema_decay: float | None = number(None, "lie between 0 and 1, or be None", lambda x: 0 < x < 1)
    max_skipped_steps: int = count(20, at_least=0)
    deterministic: bool | None = None
    num_workers: int = count(0, at_least=0)
    worker_timeout: float = number(300.0, "be a positive number", lambda x: x > 0)
    max_bad_share: float = number(0.01, "lie in [0, 1]", lambda x: 0 <= x <= 1)
    log_every_n_steps: int = count(10)
    save_every_steps: int | None = count(500)
    evaluate_every_steps: int | None = count(None)
    keep_checkpoints: int = count(3)
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages must hold at least one Stage, got none")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"stages must hold Stages, got {stage!r}")
        super().__post_init__()
        require_number("min_lr", self.min_lr, f"lie in [0, lr={self.lr}]", lambda x: 0 <= x <= self.lr)
        if self.warmup is not None and self.warmup > self.total_steps:
            raise ValueError(f"warmup must not exceed the run's {self.total_steps} steps, got {self.warmup}")
        if self.cooldown is not None and self.cooldown + self.warmup_steps > self.total_steps:
            steps = f"{self.total_steps - self.warmup_steps} steps after the warm-up"
            raise ValueError(f"cooldown must not exceed the run's {steps}, got {self.cooldown}")

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return max(1, self.total_steps // 20) if self.warmup is None else self.warmup

    @property
    def cooldown_steps(self) -> int:
        """Steps in which the learning rate of "wsd" falls at the end."""
        if self.cooldown is not None:
            return self.cooldown
        return min(max(1, self.total_steps // 5), self.total_steps - self.warmup_steps)

    def stage_at(self, step: int) -> tuple[int, Stage]:
        """Return the number and the stage that step ``step`` (from 0) belongs to; the last one from the end on."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, stage
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, from which `from_dict` makes an equal config."""
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Make a config from what `to_dict` returned.

        Raises:
            ValueError: a key is unknown; the nearest known one is named.
        """
        refuse_unknown_keys(cls, values)
        stages = []
        if not isinstance(values.get("stages", []), list | tuple):
            raise ValueError(f"stages must be a list, got {values['stages']!r}")
        for stage in values.get("stages", ()):
            refuse_unknown_keys(Stage, stage)
            stages.append(Stage(**stage))
        return cls(**{**values, "stages": tuple(stages)})


def join_settings(run: RunConfig, task: str, own: Settings) -> dict[str, Any]:
    """Return all settings of a run as its JSON holds them: those of the task named ``task`` nested under "task"."""
    return {**run.to_dict(), "task": {"name": task, **own.to_dict()}}


def split_settings(values: Mapping[str, Any], task: type[Settings]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate a run's JSON into the settings of the run and those of its task.

    Args:
        values: the run's settings; those of the task are nested under "task", or lie beside the run's, which is how
            earlier versions wrote them.
        task: the task's class of settings.

    Raises:
        ValueError: "task" is not an object, or it repeats a setting that lies beside it.
    """
    nested = values.get("task", {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"task must be given as names with values, got {nested!r}")
    names = task.__dataclass_fields__.keys()
    beside = {name: value for name, value in values.items() if name in names}
    if twice := sorted(beside.keys() & nested.keys()):
        raise ValueError(f"task.{twice[0]} is given twice: inside task and beside it")
    run = {name: value for name, value in values.items() if name != "task" and name not in names}
    return run, {**beside, **{name: value for name, value in nested.items() if name != "name"}}
