"""The contrastive loss, forward and backward: time in turns with the plain one and open_clip's, and peak memory.

    python -m bench.cpu.rows.contrastive COMPETITOR BATCH DIM     one call, its seconds and its peak memory

Letters: B pairs · D embedding dim.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cpu.rows.base import OURS, Run, Skipped, Subject, peak_of
from florence_fast.ops import contrastive_loss
from florence_fast.ops.contrastive_loss.cases import eager, setup

DIM = 512
TIMED = (2048, 4096, 8192)
PEAKS = (4096, 8192, 16384, 32768)
MOST_PAIRS = 16384
"""Up to here those that hold all logits take part: twice as many take 17 GB and minutes."""


def measure(run: Run) -> None:
    """Make the rows."""
    for batch in (256,) if run.tiny else TIMED:
        inputs = setup(batch, DIM, None, torch.float32, "cpu").tensors
        builds = {name: functools.partial(_build, name, inputs) for name in LOSSES}
        run.compare(_subject(batch, "time"), builds)
    for batch in (256,) if run.tiny else PEAKS:
        for name in LOSSES:
            subject = _subject(batch, "memory")
            if batch > MOST_PAIRS and name != OURS:
                reason = f"holds all logits, which up to {MOST_PAIRS:,} pairs are measured"
                run.put(subject, name, {"status": "missing", "reason": reason})
            elif name == "open_clip" and importlib.util.find_spec("open_clip") is None:
                run.put(subject, name, {"status": "missing", "reason": "open_clip is not installed"})
            else:
                run.peak(subject, name, __name__, name, str(batch), str(DIM))


def _subject(batch: int, measured: str) -> Subject:
    shape = f"{batch:,} pairs" if measured == "time" else f"peak memory of {batch:,} pairs"
    return Subject("contrastive_loss", shape, {"batch": batch, "dim": DIM, "measured": measured}, "fp32", "both")


def _build(name: str, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    return _both(LOSSES[name](), inputs)


def _both(loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        loss(**leaves).backward()

    return run


def _open_clip() -> Callable[..., Tensor]:
    try:
        from open_clip.loss import ClipLoss
    except ImportError as error:
        raise Skipped(f"open_clip is not installed ({error})") from error
    return ClipLoss()


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    OURS: lambda: contrastive_loss,
    "eager": lambda: lambda **inputs: eager(**inputs, labels=None),
    "open_clip": _open_clip,
}


def main(words: list[str]) -> None:
    """Measure one call after a small one, which loads what any call loads."""
    name, batch, dim = words[0], int(words[1]), int(words[2])
    loss = LOSSES[name]()
    _both(loss, setup(64, dim, None, torch.float32, "cpu").tensors)()
    inputs = setup(batch, dim, None, torch.float32, "cpu").tensors
    print(json.dumps(peak_of(_both(loss, inputs))))


if __name__ == "__main__":
    main(sys.argv[1:])
