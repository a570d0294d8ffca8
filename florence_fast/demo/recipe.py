"""The demo's recipes: some minutes, most of an hour, and going on from trained weights."""

import math
from dataclasses import dataclass, replace

from florence_fast.data.augment import BatchAugment
from florence_fast.models.config import FlorenceConfig
from florence_fast.tasks.contrastive import ContrastiveConfig
from florence_fast.train.config import RunConfig, Stage

EVALUATIONS = 6  # points of the accuracy curve
LOG_EVERY = 10  # steps between two lines with the loss


@dataclass(frozen=True)
class Recipe:
    """A named schedule of the paper's kind: first augmented texts, then plain ones; first small images, then large.

    ``keyword_prob`` is the share of augmented texts that are one of Unicode's keywords or its short name, and
    ``augmentation`` the strength of the changes to the images. The longer the run, the more of both it can use.
    ``grounds`` is the share of images that get another ground than white. A run from trained weights ends with an
    average of its weights and of those (WiSE-FT, arXiv 2109.01903); ``keep`` is their share.
    """

    name: str
    stages: tuple[Stage, ...]
    lr: float
    warmup: int
    keyword_prob: float
    augmentation: float
    grounds: float = 0.0
    keep: float = 0.0

    def augment(self, model: FlorenceConfig) -> BatchAugment:
        """Return changes of shape and colour that stand for another artist's hand."""
        return BatchAugment(mean=model.image_mean, std=model.image_std, grounds=self.grounds).strengthened(
            self.augmentation
        )

    def run(self, *, seed: int, precision: str = "auto", stages: tuple[Stage, ...] | None = None) -> RunConfig:
        """Return the engine's settings of this recipe, or of ``stages`` in place of its own."""
        stages = stages or self.stages
        steps = sum(stage.steps for stage in stages)
        return RunConfig(
            stages=stages,
            batch_size=256,
            seed=seed,
            lr=self.lr,
            min_lr=1e-5,
            warmup=min(self.warmup, steps // 5),
            precision=precision,
            log_every_n_steps=LOG_EVERY,
            save_every_steps=evaluation_interval(steps),
        )

    def task(self, loss: str) -> ContrastiveConfig:
        """Return the settings of contrastive training with ``loss``."""
        return ContrastiveConfig(loss=loss, keyword_prob=self.keyword_prob, template_prob=0.15)


def evaluation_interval(steps: int) -> int:
    """Steps between two evaluations of a run of ``steps``: a multiple of the steps between two lines of the log."""
    return LOG_EVERY * math.ceil(steps / EVALUATIONS / LOG_EVERY)


# At 32 px a step costs less than half of one at 64 px. The cosine has fallen by the time the images grow; from there
# on it starts higher again, since the filters have to get used to shapes of twice the size.
QUICK = Recipe(
    "quick",
    stages=(
        Stage(steps=600, image_size=32),
        Stage(steps=300, image_size=64, augment_text=False, peak_lr=1.6e-3),
    ),
    lr=8e-4,
    warmup=100,
    keyword_prob=0.15,
    augmentation=1.0,
)
LONG = Recipe(
    "long",
    stages=(
        Stage(steps=2400, image_size=32),
        Stage(steps=1500, image_size=64, peak_lr=1.6e-3),
        Stage(steps=600, image_size=64, augment_text=False, peak_lr=1.6e-3),
    ),
    lr=8e-4,
    warmup=200,
    keyword_prob=0.35,
    augmentation=1.35,
    grounds=0.67,
)
# From trained weights: the learning rate is that of a first stage's middle.
FURTHER = Recipe(
    "further",
    stages=(
        Stage(steps=800, image_size=64),
        Stage(steps=400, image_size=64, augment_text=False),
    ),
    lr=5e-4,
    warmup=20,
    keyword_prob=0.35,
    augmentation=1.35,
    grounds=0.67,
)


def rehearsal(config: RunConfig, steps: int) -> RunConfig:
    """Shrink every stage so that the whole takes about ``steps`` small steps."""
    shares = [max(1, round(steps * stage.steps / config.total_steps)) for stage in config.stages]
    stages = tuple(replace(stage, steps=share) for stage, share in zip(config.stages, shares, strict=True))
    total = sum(shares)
    return replace(config, stages=stages, batch_size=32, warmup=0, save_every_steps=total)
