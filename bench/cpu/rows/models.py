"""Image towers: ours, ours through the definitions alone, Hugging Face's Swin as it is and accelerated, torch.compile.

Swin-T is the same model everywhere, with the same number of parameters; weights are random.

Letters: B images.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cpu.rows.base import OURS, Run, Skipped, Subject
from florence_fast import compat, ops
from florence_fast.models import create_model

IMAGE, BATCH = 224, 8
Step = Callable[[], Any]


def measure(run: Run) -> None:
    """Make the rows."""
    batch = 1 if run.tiny else BATCH
    x = torch.randn(batch, 3, IMAGE, IMAGE)
    for dtype in ("fp32",) if run.tiny else ("fp32", "bf16"):
        for mode in ("forward", "both"):
            # To compile one tower takes as long as all else, and a rehearsal gains nothing from it.
            chosen = [name for name in TOWERS if not (run.tiny and "compile" in name)]
            builds = {name: functools.partial(_step, name, x, dtype, mode) for name in chosen}
            sizes = {"model": "swin_tiny", "resolution": IMAGE, "batch": batch}
            op = "inference" if mode == "forward" else "training"
            run.compare(Subject(op, f"Swin-T, {IMAGE} px, batch {batch}", sizes, dtype, mode), builds)


def _step(name: str, x: Tensor, dtype: str, mode: str) -> Step:
    """Return one pass: inference with bf16 weights, or forward and backward under autocast."""
    tower, half = TOWERS[name](), dtype == "bf16"
    if mode == "forward":
        model = tower.eval().to(torch.bfloat16 if half else torch.float32)
        inputs = x.to(torch.bfloat16) if half else x

        def infer() -> None:
            with torch.inference_mode():
                model(inputs)

        infer()
        return infer
    tower.train()

    def train() -> None:
        tower.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = tower(x)
        out.float().square().mean().backward()

    train()
    return train


class _Reference(nn.Module):
    """A tower whose ops are their definitions."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        with ops.backend("reference"):
            return self.tower(x)


class _HuggingFace(nn.Module):
    """Hugging Face's Swin-T, pooled."""

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise Skipped("transformers is not installed")
        from transformers import SwinConfig, SwinModel

        self.model = SwinModel(SwinConfig(drop_path_rate=0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output


def _ours() -> nn.Module:
    return create_model("swin_tiny")


def _accelerated() -> nn.Module:
    tower = _HuggingFace()
    compat.accelerate(tower.model, verbose=False)
    return tower


TOWERS: dict[str, Callable[[], nn.Module]] = {
    OURS: _ours,
    "ours (reference)": lambda: _Reference(_ours()),
    "ours (torch.compile)": lambda: torch.compile(_ours()),
    "Hugging Face": _HuggingFace,
    "Hugging Face, accelerated": _accelerated,
    "Hugging Face, compiled": lambda: torch.compile(_HuggingFace()),
}
