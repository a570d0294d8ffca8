"""One step of contrastive pretraining at the paper's batch on one device, by the gradient cache (section 2.2).

Forward and backward of both towers under bfloat16 autocast, with UniCL's loss over the whole batch; the optimiser is
left out. Images lie on the device as bytes, which at 224 pixels are 3.7 GB, and are made numbers a micro-batch at a
time.

Letters: B pairs.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.harness import row_of, shown
from bench.session import Session
from florence_fast.models import create_model
from florence_fast.timing import time_calls
from florence_fast.train import ContrastiveLoss, GradCache

PAPER_BATCH = 24_576
"""Of section 2.2."""


@dataclass(frozen=True)
class Shape:
    """One model, its whole batch and its micro-batch."""

    model: str
    batch: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.model}_b{self.batch}_by_{self.micro_batch}"


SHAPES = (Shape("florence_tiny", PAPER_BATCH, 512), Shape("florence_base", PAPER_BATCH, 256))
REHEARSAL = (Shape("florence_nano", 6, 4),)


def run(session: Session) -> dict[str, Any]:
    """Measure the steps; one that is too large for the device says so."""
    counts = dict.fromkeys(("timed", "missing", "error"), 0)
    for shape in REHEARSAL if session.plan.rehearse else SHAPES:
        key = f"pretraining|{shape}"
        if session.store.finished(key):
            continue
        session.check_time()
        try:
            outcome = _measured(shape, session)
        except torch.OutOfMemoryError as error:
            outcome = {"status": "missing", "reason": f"too little memory: {str(error)[:120]}"}
        except Exception as error:
            outcome = {"status": "error", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        entries = {"key": key, "op": "pretraining", "shape": str(shape), "sizes": asdict(shape), "dtype": "bf16"}
        row = row_of(session, outcome, **entries, mode="both", competitor="ours (gradient cache)")
        session.store.put(row)
        counts[row["status"]] += 1
        timed = row["status"] == "timed"
        said = f"{row['median']:.2f} s, {shape.batch / row['median']:,.0f} pairs/s" if timed else shown(row)
        session.show(f"  {shape}: {said}")
    if counts["error"]:
        raise RuntimeError("a step failed; its row has the reason")
    return counts


def _measured(shape: Shape, session: Session) -> dict[str, Any]:
    device = session.device
    model = create_model(shape.model, device=device).train()
    text, size = model.config.text, model.config.image.img_size
    draw = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (shape.batch, 3, size, size), generator=draw, device=device, dtype=torch.uint8)
    tokens = torch.randint(1, text.vocab_size, (shape.batch, text.context_length), generator=draw, device=device)
    labels = torch.randint(0, shape.batch, (shape.batch,), generator=draw, device=device)
    cache = GradCache(_FromBytes(model), ContrastiveLoss(), shape.micro_batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            cache.step(images, tokens, labels=labels)

    timing = time_calls({"step": [step]}, device, session.seconds)["step"]
    outcome = {"status": "timed", "errors": [], **asdict(timing)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        outcome["peak_bytes"] = torch.cuda.max_memory_allocated()
    return outcome


class _FromBytes(torch.nn.Module):
    """A dual encoder that takes images as bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor | None, text: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        images = None if image is None else image.float().div_(127.5).sub_(1)
        return self.model(images, text)
