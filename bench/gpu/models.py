"""Whole models on the device: inference and training, images a second, share of the matrix rate, peak memory.

Our competitors have the same weights. "eager" is our tower with each module called by itself and attention through
the library, which is what a careful programmer writes; torch.compile gets the same. Before it is timed, a competitor's
features are compared with those of float64, and may be twice as far from them as eager's. Hugging Face's and timm's
Swin have random weights of their own and are timed as they are.

Letters: B images.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import row_of, shown
from bench.machine import ROOT, clocks_under_load
from bench.session import Missing, Session
from florence_fast import ops
from florence_fast.models import create_model, get_model_config
from florence_fast.ops.dispatch import allows_tf32
from florence_fast.timing import time_calls
from florence_fast.verify.compare import Judgement, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
MODES = {"inference": "forward", "training": "both"}
SLOW = ("torch.compile", "ours, compiled")


Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to features."""


@dataclass(frozen=True)
class Shape:
    """One model at one size."""

    model: str
    resolution: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model}_{self.resolution}_b{self.batch}"


# What the goals speak of comes first, then the other models, then more and fewer images at a time.
INFERENCE = (
    *(Shape("swin_base", 224, 64), Shape("coswin_huge", 224, 64)),
    *(Shape("swin_base", 384, 64), Shape("coswin_huge", 384, 32)),
    *(Shape(f"{kind}", 224, 64) for kind in ("swin_tiny", "swin_large", "coswin_tiny", "coswin_base", "coswin_large")),
    *(Shape("swin_base", 224, batch) for batch in (1, 8, 256, 1024)),
)
TRAINING = (
    *(Shape("swin_base", 224, 128), Shape("coswin_huge", 224, 32)),
    *(Shape("swin_tiny", 224, 128), Shape("swin_large", 224, 64), Shape("coswin_base", 224, 128)),
    *(Shape("swin_base", 224, batch) for batch in (32, 256, 512)),
)
REHEARSAL = (Shape("swin_tiny", 224, 1),)


def inference(session: Session) -> dict[str, Any]:
    """Measure features of images, without a graph, weights in the dtype."""
    return _measure("inference", session)


def training(session: Session) -> dict[str, Any]:
    """Measure forward and backward under autocast, weights in float32; the optimiser is left out."""
    return _measure("training", session)


def first_call(session: Session) -> dict[str, Any]:
    """Measure the first features of one image in a fresh process, with Triton's cache empty and then full."""
    counts = {"timed": 0, "error": 0}
    states = ("cold",) if session.plan.rehearse else ("cold", "warm")
    # A cache is warm only behind the call that filled it, so a start that was cut between the two makes both again.
    if all(session.store.finished(f"first_call|{state}") for state in states):
        return counts
    with tempfile.TemporaryDirectory() as cache:
        for state in states:
            key = f"first_call|{state}"
            session.check_time()
            words = [sys.executable, "-m", "bench.gpu.models", str(session.device)]
            variables = {**os.environ, "TRITON_CACHE_DIR": cache}
            done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                seconds = dict.fromkeys(("median", "q20", "q80"), json.loads(done.stdout.splitlines()[-1]))
                outcome = {"status": "timed", "errors": [], "samples": 1, "repeats": 1, **seconds}
            else:
                outcome = {"status": "error", "reason": (done.stderr.strip().splitlines() or ["no output"])[-1]}
            entries = {"key": key, "op": "first_call", "shape": f"swin_tiny_{state}", "sizes": {"cache": state}}
            session.store.put(row_of(session, outcome, **entries, dtype="bf16", mode="forward", competitor="ours"))
            counts[outcome["status"]] += 1
            said = f"{outcome['median']:.2f} s" if outcome["status"] == "timed" else outcome["reason"]
            session.show(f"  first features, {state} cache: {said}")
    if counts["error"]:
        raise RuntimeError("the first call failed; its row has the reason")
    return counts


def _measure(op: str, session: Session) -> dict[str, Any]:
    rehearse = session.plan.rehearse
    shapes = REHEARSAL if rehearse else INFERENCE if op == "inference" else TRAINING
    quick = [*(name for name in COMPETITORS if name not in SLOW), *OTHERS]
    counts = dict.fromkeys(("timed", "missing", "error", "wrong"), 0)
    for dtype in ("tf32",) if rehearse else DTYPES:
        for competitors in (quick,) if rehearse else (quick, SLOW):
            for shape in shapes:
                for row in _rows(op, shape, dtype, tuple(competitors), session):
                    counts[row["status"]] += 1
    if counts["error"] or counts["wrong"]:
        raise RuntimeError(f"{counts['wrong']} rows with wrong values, {counts['error']} with an error")
    return counts


def _rows(op: str, shape: Shape, dtype: str, names: tuple[str, ...], session: Session) -> Iterator[dict[str, Any]]:
    """Make the rows of some competitors at one size; too little memory is an outcome like any other."""
    keys = {name: f"{op}|{shape}|{dtype}|{name}" for name in names}
    pending = [name for name in names if not session.store.finished(keys[name])]
    if not pending:
        return
    session.check_time()
    tower = create_model(shape.model).to(session.device).eval()
    flops = _flops(shape) * (1 if op == "inference" else 3)
    exact, limit = _gate(tower, shape, dtype)
    for name in pending:
        session.check_time()
        try:
            outcome = _outcome(op, name, copy.deepcopy(tower), shape, dtype, (exact, limit), session)
        except Missing as reason:
            outcome = {"status": "missing", "reason": str(reason)}
        except torch.OutOfMemoryError as error:
            outcome = {"status": "missing", "reason": f"too little memory: {str(error)[:120]}"}
        except Exception as error:
            outcome = {"status": "error", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        entries = {"key": keys[name], "op": op, "shape": str(shape), "sizes": asdict(shape), "dtype": dtype}
        row = row_of(session, outcome, **entries, mode=MODES[op], competitor=name, flops=flops)
        if row["status"] == "timed":
            row["flops_per_second"] = flops / row["median"]
            row["matrix_ratio"] = row["flops_per_second"] / session.matrix_rate
            said = f"{shape.batch / row['median']:,.0f} images/s, {row['matrix_ratio']:.0%} of the matrix rate"
        else:
            said = shown(row)
        session.store.put(row)
        session.show(f"  {shape} {dtype:5} {MODES[op]:8} {name:22} {said}")
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()
        yield row


def _hugging_face(shape: Shape) -> nn.Module:
    """Build Hugging Face's Swin of this size, pooled."""
    from transformers import SwinConfig, SwinModel

    width, depths, heads, window = _swin(shape)
    options = {"embed_dim": width, "depths": list(depths), "num_heads": list(heads), "window_size": window}
    model = SwinModel(SwinConfig(image_size=shape.resolution, **options))

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).pooler_output

    return Pooled()


def _timm(shape: Shape) -> nn.Module:
    """Build timm's Swin of this size, without a classifier."""
    import timm

    width, depths, heads, window = _swin(shape)
    options = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window, "num_classes": 0}
    return timm.models.swin_transformer.SwinTransformer(img_size=shape.resolution, **options)


def _swin(shape: Shape) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    config = get_model_config(shape.model)
    if config.kind != "swin":
        raise Missing(f"has no {shape.model}")
    return config.embed_dim, config.depths, config.num_heads, config.window_size


OTHERS: dict[str, tuple[str, Callable[[Shape], nn.Module]]] = {
    "Hugging Face": ("transformers", _hugging_face),
    "timm": ("timm", _timm),
}
"""Package and model of those who have weights of their own."""


def _other(name: str, shape: Shape) -> nn.Module:
    package, build = OTHERS[name]
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed")
    return build(shape)


def _outcome(
    op: str, name: str, tower: nn.Module, shape: Shape, dtype: str, gate: tuple[Tensor, float], session: Session
) -> dict[str, Any]:
    """Build a competitor, hold it to the gate and time it."""
    half, errors = DTYPES[dtype], []
    if name in OTHERS:
        tower = run = _other(name, shape).to(session.device)
    else:
        run = COMPETITORS[name](tower)
    exact, limit = gate
    with precision(dtype):
        if name not in OTHERS:
            with torch.no_grad(), autocast(session.device, half):
                error = relative_error(run(_images(shape, session.device, 2)).float(), exact)
            errors = [Judgement("features", error, limit / 2, limit).to_dict()]
        if errors and not errors[0]["passed"]:
            reason = f"features are {error:.1e} from float64's, at most {limit:.1e}"
            return {"status": "wrong", "reason": reason, "errors": errors}
        images = _images(shape, session.device, shape.batch)
        step = _inference(run, tower, images, half) if op == "inference" else _training(run, tower, images, half)
        step()
        timing = time_calls({name: [step]}, session.device, session.seconds)[name]
        outcome = {"status": "timed", "errors": errors, **asdict(timing)}
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            outcome |= {"peak_bytes": torch.cuda.max_memory_allocated(), **clocks_under_load(step, timing.median)}
    return outcome


def _inference(
    run: Callable[[Tensor], Tensor], tower: nn.Module, images: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    tower.eval().to(dtype)
    images = images.to(dtype)

    def step() -> None:
        with torch.no_grad():
            run(images)

    return step


def _training(
    run: Callable[[Tensor], Tensor], tower: nn.Module, images: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    tower.train()

    def step() -> None:
        tower.zero_grad(set_to_none=True)
        with autocast(images.device, dtype):
            out = run(images)
        out.float().square().mean().backward()

    return step


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let float32 products use TF32 inside, where that is what is measured."""
    if dtype != "tf32":
        yield
        return
    allowed = allows_tf32(torch.empty(0))
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return an autocast region; none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _images(shape: Shape, device: torch.device, batch: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(0)
    return torch.randn(batch, 3, shape.resolution, shape.resolution, generator=draw, device=device)


def _gate(tower: nn.Module, shape: Shape, dtype: str) -> tuple[Tensor, float]:
    """Return the features of two images in float64, and how far those of a competitor may be from them."""
    device = next(tower.parameters()).device
    images, plain = _images(shape, device, 2), module_by_module(copy.deepcopy(tower))
    with torch.no_grad(), ops.backend("torch"):
        exact = copy.deepcopy(plain).double()(images.double())
        with precision(dtype), autocast(device, DTYPES[dtype]):
            error = relative_error(plain(images).float(), exact)
    return exact, max(2 * error, 1e-3)


def _flops(shape: Shape) -> int:
    """Count the FLOPs of the products of one forward pass, on tensors without memory."""
    tower = create_model(shape.model, device="meta")
    images = torch.empty(1, 3, shape.resolution, shape.resolution, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), ops.backend("reference"):
        tower.eval()(images)
    return counter.get_total_flops() * shape.batch


def module_by_module(tower: nn.Module) -> nn.Module:
    """Hang a hook on every module, so that no op computes past it."""
    for module in tower.modules():
        module.register_forward_hook(lambda module, args, out: None)
    return tower


def _ours(tower: nn.Module) -> Features:
    return tower


def _ours_compiled(tower: nn.Module) -> Features:
    return torch.compile(tower, dynamic=False)


def _eager(tower: nn.Module) -> Features:
    return _through_the_library(module_by_module(tower))


def _eager_compiled(tower: nn.Module) -> Features:
    return _through_the_library(torch.compile(module_by_module(tower), dynamic=False))


def _through_the_library(tower: Features) -> Features:
    def run(images: Tensor) -> Tensor:
        with ops.backend("torch"):
            return tower(images)

    return run


COMPETITORS: dict[str, Callable[[nn.Module], Features]] = {
    "ours": _ours,
    "eager": _eager,
    "torch.compile": _eager_compiled,
    "ours, compiled": _ours_compiled,
}


def main(words: list[str]) -> None:
    """Print the seconds until a fresh process has the features of one image, imports not counted."""
    device, start = torch.device(words[0]), time.perf_counter()
    tower = create_model("swin_tiny").to(device, torch.bfloat16).eval()
    with torch.no_grad():
        tower(torch.zeros(1, 3, 224, 224, device=device, dtype=torch.bfloat16)).sum().item()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
