"""A training run as data: the stages of the paper and the settings of the engine.

Section 2.2 of the paper trains in stages: on augmented texts, then without them, then at high resolution. A stage is
a row here and nothing else, so a schedule can be read, stored in a checkpoint and compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from florence_fast.errors import did_you_mean, require_count, require_number, unknown
from florence_fast.precision import PRECISIONS

LOSSES = ("unicl", "clip")
SMALLEST_EPS = 2.0**-126
"""The smallest normal number of fp32: a smaller `eps` may be 0 there, and AdamW divides 0 by it."""


def _refuse_unknown_keys(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse what is not a mapping from fields of the dataclass ``cls``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be given as names with values, got {values!r}")
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting {key!r}{did_you_mean(str(key), known)}")


def _require_bool(name: str, value: object) -> None:
    """Refuse what is not True or False, such as the word "false" of a JSON file, which would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


@dataclass(frozen=True)
class Stage:
    """One stretch of a run: how many steps, on which pictures, with which texts.

    Args:
        steps: optimiser steps of this stage.
        image_size: side of the square pictures, in pixels.
        augment_text: draw keywords, short names and templates in place of the plain text.
        batch_size: samples a step and process; None takes the run's.
        window_size: attention window of the image tower from this stage on; None leaves it as it is.
        peak_lr: height of the cosine during this stage; None takes the run's `lr`.
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
        _require_bool("Stage.augment_text", self.augment_text)


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
class TrainConfig:
    """Everything that a run is determined by, apart from its model and its data.

    Args:
        stages: what is trained on, in order.
        batch_size: samples a step and process.
        seed: of the data order, the augmentation and drop path.
        lr: peak of the learning rate.
        min_lr: the value that the cosine ends at.
        warmup: steps of linear warm-up; None takes a twentieth of the run.
        weight_decay: of matrices and convolutions; biases, norms, tables and embeddings have none.
        beta1, beta2, eps: of AdamW.
        grad_clip_norm: largest gradient norm; None leaves gradients alone.
        precision: a word of ``florence_fast.precision``; "auto" is bf16 autocast where the device is fast at it. A run
            records what the word meant on its device.
        loss: "unicl" (equal texts are positives of each other) or "clip" (the diagonal).
        loss_reduction, loss_chunk_size, gather: passed to `ContrastiveLoss`.
        micro_batch_size: samples that are encoded at a time, through the gradient cache; None encodes all at once.
        grad_checkpointing: recompute activations in the backward pass.
        ema_decay: keep a moving average of the weights; None keeps none.
        max_skipped_steps: steps in a row that may be skipped for NaN or Inf before the run is stopped.
        deterministic: use torch's deterministic algorithms; None does so on a CPU.
        crop: what a sample shows of its image, as for `PairLoader`; None takes the model's ``config.resize_mode``. Any
            other than "random_resized" also becomes the model's, so that its evaluation sees what it was trained on.
        keyword_prob, template_prob, pictures_per_text, cache, num_workers, worker_timeout, max_bad_share:
            passed to `PairLoader`.
        log_every_n_steps: length of an interval: one line, one record, one call of `on_interval`.
        save_every_steps: steps between checkpoints; None saves at the end and on a signal only.
        keep_checkpoints: how many valid checkpoints stay.
        progress: show a bar and the log lines in the terminal.
        tensorboard: write event files where TensorBoard is installed.

    Raises:
        ValueError: a value is out of its range, or a word is unknown.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 512
    seed: int = 0
    lr: float = 5e-4
    min_lr: float = 0.0
    warmup: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    grad_clip_norm: float | None = 1.0
    precision: str = "auto"
    loss: str = "unicl"
    loss_reduction: str = "mean_directions"
    loss_chunk_size: int | None = None
    gather: str = "all_gather"
    micro_batch_size: int | None = None
    grad_checkpointing: bool = False
    ema_decay: float | None = None
    max_skipped_steps: int = 20
    deterministic: bool | None = None
    keyword_prob: float = 0.3
    template_prob: float = 0.5
    pictures_per_text: int = 1
    crop: str | None = None
    cache: bool = True
    num_workers: int = 0
    worker_timeout: float = 300.0
    max_bad_share: float = 0.01
    log_every_n_steps: int = 10
    save_every_steps: int | None = 500
    keep_checkpoints: int = 3
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages must hold at least one Stage, got none")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"stages must hold Stages, got {stage!r}")
        for name, known in (("precision", PRECISIONS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("batch_size", "log_every_n_steps", "keep_checkpoints", "pictures_per_text"):
            require_count(name, getattr(self, name), at_least=1)
        for name in ("loss_chunk_size", "micro_batch_size", "save_every_steps"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), at_least=1)
        for name in ("max_skipped_steps", "num_workers"):
            require_count(name, getattr(self, name), at_least=0)
        require_count("seed", self.seed, at_least=0, at_most=1 << 62)
        for name in ("grad_checkpointing", "cache", "progress", "tensorboard"):
            _require_bool(name, getattr(self, name))
        if self.deterministic is not None:
            _require_bool("deterministic", self.deterministic)
        self._check_numbers()
        if self.warmup is not None:
            require_count("warmup", self.warmup, at_least=0)
            if self.warmup > self.total_steps:
                raise ValueError(f"warmup must not exceed the run's {self.total_steps} steps, got {self.warmup}")

    def _check_numbers(self) -> None:
        """Refuse numbers out of range, NaN and Inf among them: with one of these the weights would end as NaN."""
        for name in ("lr", "worker_timeout"):
            require_number(name, getattr(self, name), "be a positive number", lambda x: x > 0)
        smallest = f"be a number of at least {SMALLEST_EPS:.3g}, the smallest of fp32"
        require_number("eps", self.eps, smallest, lambda eps: eps >= SMALLEST_EPS)
        for name in ("keyword_prob", "template_prob", "max_bad_share"):
            require_number(name, getattr(self, name), "lie in [0, 1]", lambda x: 0 <= x <= 1)
        for name in ("beta1", "beta2"):
            require_number(name, getattr(self, name), "lie in [0, 1)", lambda x: 0 <= x < 1)
        require_number("min_lr", self.min_lr, f"lie in [0, lr={self.lr}]", lambda x: 0 <= x <= self.lr)
        require_number("weight_decay", self.weight_decay, "be a number and not negative", lambda x: x >= 0)
        if self.grad_clip_norm is not None:
            require_number("grad_clip_norm", self.grad_clip_norm, "be positive or None", lambda x: x > 0)
        if self.ema_decay is not None:
            wanted = "lie between 0 and 1, or be None"
            require_number("ema_decay", self.ema_decay, wanted, lambda x: 0 < x < 1)

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return max(1, self.total_steps // 20) if self.warmup is None else self.warmup

    def stage_at(self, step: int) -> tuple[int, Stage]:
        """Return the number and the stage that step ``step`` (from 0) belongs to; the last one from the end on."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, from which `from_dict` makes an equal config."""
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from what `to_dict` returned.

        Raises:
            ValueError: a key is unknown; the nearest known one is named.
        """
        _refuse_unknown_keys(cls, values)
        stages = []
        if not isinstance(values.get("stages", []), list | tuple):
            raise ValueError(f"stages must be a list, got {values['stages']!r}")
        for stage in values.get("stages", ()):
            _refuse_unknown_keys(Stage, stage)
            stages.append(Stage(**stage))
        return cls(**{**values, "stages": tuple(stages)})
