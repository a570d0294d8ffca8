"""A step of contrastive pretraining under bfloat16 autocast, through each of our backends; without the optimiser."""

import functools

import torch

from bench.cpu.native_rows.base import OURS, Call, Run, Subject
from bench.cpu.native_rows.windows import OUR_TORCH
from florence_fast import ops
from florence_fast.models import create_model
from florence_fast.train import ContrastiveLoss

OPS = ("training_step",)
MODEL, BATCH = "florence_tiny", 8
TINY = "florence_nano"
REFERENCE = "our reference backend"
BACKENDS = {OURS: "auto", OUR_TORCH: "torch", REFERENCE: "reference"}


def measure(run: Run) -> None:
    """Make the row."""
    name, batch = (TINY, 2) if run.tiny else (MODEL, BATCH)
    subject = Subject("training_step", f"{name}, {batch} pairs", {"model": name, "batch": batch}, "bf16", "both")
    if not run.wanted(subject, BACKENDS):
        return
    model = create_model(name, **({"img_size": 32, "context_length": 8} if run.tiny else {})).train()
    loss = ContrastiveLoss()
    size, text = model.config.image.img_size, model.config.text
    images = torch.randn(batch, 3, size, size)
    tokens = torch.randint(1, text.vocab_size, (batch, text.context_length))

    def build(backend: str) -> Call:
        def step() -> None:
            model.zero_grad()
            with ops.backend(backend):
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(*model(images, tokens))
                value.backward()

        return step

    run.compare(subject, {who: functools.partial(build, backend) for who, backend in BACKENDS.items()})
