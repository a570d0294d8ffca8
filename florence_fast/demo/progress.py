"""What a demo says and measures while it trains."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from florence_fast.data.artists import artists_names, artists_test
from florence_fast.demo.plan import predict_seconds, say_minutes
from florence_fast.evaluate import zero_shot
from florence_fast.evaluate.features import evaluation_transform
from florence_fast.models.florence import Florence
from florence_fast.train.config import RunConfig
from florence_fast.train.engine import Trainer

logger = logging.getLogger(__name__)


class Progress:
    """Called every ten steps: says once how long the rest takes, and asks for the unseen artist at each checkpoint.

    Args:
        model: what is trained.
        tokenizer: its tokenizer.
        config: of the run; it evaluates every ``save_every_steps`` steps and at the end.
        speed: seconds of a step by image size, as they were measured before; None says nothing about time.
    """

    def __init__(
        self,
        model: Florence,
        tokenizer: Callable[[list[str]], Tensor],
        config: RunConfig,
        speed: Mapping[int, float] | None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.speed = model, tokenizer, config, speed
        self.names, self.test = artists_names(), artists_test()

    def __call__(self, trainer: Trainer, record: dict[str, Any]) -> dict[str, Any] | None:
        """Return what was measured, None where nothing was."""
        step, config = trainer.step, self.config
        size, every = config.stage_at(step - 1)[1].image_size, config.save_every_steps or config.total_steps
        if self.speed is not None:
            slower = record["batch_time"] / self.speed[size]
            left = slower * predict_seconds(config, self.speed, every, step)
            logger.info("%s on this machine from here on", say_minutes(left))
            self.speed = None
        if step % every and step < config.total_steps:
            return None
        transform = evaluation_transform(self.model, size)
        found = zero_shot(
            self.model, self.tokenizer, self.test, self.names, transform=transform, precision=config.precision
        )
        shares = {key: found[key] for key in ("top1", "top5", "top10")}
        logger.info("unseen artist at %d px: top-1 %.3f, top-5 %.3f", size, shares["top1"], shares["top5"])
        return {"image_size": size, **shares}
