"""Inference of Swin-T and Swin-B: ours, and Hugging Face's as it is, compiled, and after ``ff.accelerate``.

All have the same weights, so that their results can be compared.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cpu.native_rows.base import DTYPES, OURS, Call, Run, Subject
from bench.cpu.rows.base import Skipped
from florence_fast import compat
from florence_fast.models import create_model

OPS = ("inference",)


@dataclass(frozen=True)
class Tower:
    """A Swin by our name, and what Hugging Face's configuration calls the same."""

    model: str
    config: dict[str, Any]
    image: int = 224
    batch: int = 8
    window: int = 7


MODELS = {
    "Swin-T": Tower("swin_tiny", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
    "Swin-B": Tower("swin_base", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
}
TINY = {"tiny": Tower("swin_tiny", MODELS["Swin-T"].config, image=64, batch=1, window=2)}
EAGER, COMPILED, ACCELERATED = "Hugging Face", "Hugging Face, compiled", "Hugging Face, accelerated"


def measure(run: Run) -> None:
    """Make the rows."""
    for name, tower in (TINY if run.tiny else MODELS).items():
        for dtype in DTYPES:
            x = torch.randn(tower.batch, 3, tower.image, tower.image).to(DTYPES[dtype])
            builds = {
                OURS: functools.partial(_ours, tower, x),
                ACCELERATED: functools.partial(_accelerated, tower, x),
                COMPILED: functools.partial(_compiled, tower, x, run.quick or run.tiny),
                EAGER: functools.partial(_eager, tower, x),
            }
            sizes = {"model": tower.model, "resolution": tower.image, "batch": tower.batch}
            shape = f"{name}, {tower.image} px, batch {tower.batch}"
            run.compare(Subject("inference", shape, sizes, dtype, "forward"), builds)


def hugging_face(tower: Tower) -> nn.Module:
    """Return Hugging Face's Swin; the same weights each time."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    return SwinModel(SwinConfig(**tower.config, image_size=tower.image, window_size=tower.window)).eval()


def _ours(tower: Tower, x: Tensor) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(hugging_face(tower).state_dict(), weights)
        model = create_model(tower.model, weights, img_size=tower.image, window_size=tower.window)
        model = model.eval().to(x.dtype)
    return _infer(model, x, lambda out: out)


def _eager(tower: Tower, x: Tensor) -> Call:
    return _infer(hugging_face(tower).to(x.dtype), x, _pooled)


def _compiled(tower: Tower, x: Tensor, left_out: bool) -> Call:
    if left_out:
        raise Skipped("left out: it takes a minute to compile")
    return _infer(torch.compile(hugging_face(tower).to(x.dtype), dynamic=False), x, _pooled)


def _accelerated(tower: Tower, x: Tensor) -> Call:
    model = hugging_face(tower).to(x.dtype)
    compat.accelerate(model, verbose=False)
    return _infer(model, x, _pooled)


def _pooled(out: Any) -> Tensor:
    return out.pooler_output


def _infer(model: nn.Module, x: Tensor, read: Callable[[Any], Tensor]) -> Call:
    def infer() -> Tensor:
        with torch.inference_mode():
            return read(model(x))

    return infer
