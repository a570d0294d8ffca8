"""What the gradient cache costs: one training step's forward and backward in micro-batches, beside all at once.

Letters: B pairs.
"""

from collections.abc import Callable
from typing import Any

import torch

from bench.cpu.rows.base import Run, Subject
from florence_fast.models import create_model
from florence_fast.train import ContrastiveLoss, GradCache

MODEL = "florence_nano"
BATCH, MICRO_BATCHES = 256, (64, 128)


def measure(run: Run) -> None:
    """Make the rows."""
    batch, parts = (8, (4,)) if run.tiny else (BATCH, MICRO_BATCHES)
    model = create_model(MODEL).train()
    image = model.config.image.img_size
    images = torch.randn(batch, 3, image, image)
    length = model.config.text.context_length
    tokens = torch.randint(1, model.config.text.vocab_size, (batch, length))
    loss = ContrastiveLoss()

    def whole() -> None:
        model.zero_grad()
        loss(*model(images, tokens)).backward()

    def in_parts(size: int) -> Callable[[], Any]:
        def step() -> None:
            model.zero_grad()
            GradCache(model, loss, size).step(images, tokens)

        return step

    builds = {"the whole batch at once": lambda: whole}
    builds |= {f"ours, micro-batches of {size}": lambda size=size: in_parts(size) for size in parts}
    sizes = {"model": MODEL, "batch": batch, "image": image}
    run.compare(Subject("grad_cache", f"{MODEL}, {batch} pairs", sizes, "fp32", "both"), builds)
