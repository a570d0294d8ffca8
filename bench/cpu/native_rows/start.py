"""The first result after the imports: the model is made and sees one image, in a fresh process each time.

The clock of a child starts behind its imports; what a library imports later is on it. torch.compile finds an empty
cache, as it does on a machine that has not compiled this model before.
"""

import os
import statistics
import subprocess
import sys
import tempfile

from bench.cpu.native_rows.base import OURS, Run, Subject
from bench.machine import ROOT

OPS = ("first_result",)
COMPILED = "Hugging Face, compiled"
IMPORTS = {
    OURS: "import torch, florence_fast as ff",
    COMPILED: "import torch; from transformers import SwinConfig, SwinModel",
}
MODELS = {OURS: "ff.create_model('swin_tiny').eval()", COMPILED: "torch.compile(SwinModel(SwinConfig()).eval())"}
PROGRAM = """
{imports}
import time
start = time.perf_counter()
model = {model}
with torch.inference_mode():
    model(torch.randn(1, 3, 224, 224))
print(time.perf_counter() - start)
"""
COMPILATIONS = 3
"""How often the compiled one is run, which takes from half a minute to a minute; ours as often as any other work."""


def measure(run: Run) -> None:
    """Make the row; the programs take turns until each has its runs."""
    subject = Subject("first_result", "Swin-T, one image", {"model": "swin_tiny", "batch": 1}, "fp32", "forward")
    if not run.wanted(subject, IMPORTS):
        return
    missing, errors = {}, {}
    left = {OURS: 1 if run.tiny else run.turns, COMPILED: COMPILATIONS}
    if run.quick or run.tiny:
        missing[COMPILED] = "left out: it takes a minute to compile"
        del left[COMPILED]
    if not set(left) & set(run.wanted(subject, IMPORTS)):
        return
    seconds: dict[str, list[float]] = {name: [] for name in left}
    for _ in range(max(left.values())):
        for name, taken in seconds.items():
            if len(taken) < left[name] and name not in errors:
                try:
                    taken.append(first_result(name))
                except (RuntimeError, ValueError) as error:
                    errors[name] = str(error)[:300]
    times = {name: summary(taken) for name, taken in seconds.items() if taken and name not in errors}
    run.put(subject, times, missing, errors)


def first_result(name: str) -> float:
    """Return the seconds that a fresh process takes from its imports to its result."""
    program = PROGRAM.format(imports=IMPORTS[name], model=MODELS[name])
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return float(done.stdout.splitlines()[-1])


def summary(seconds: list[float]) -> dict[str, float]:
    """Return what ``florence_fast.timing.Timing`` holds."""
    q20, q80 = min(seconds), max(seconds)
    if len(seconds) > 1:
        q20, *_, q80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "q20": q20, "q80": q80, "samples": len(seconds), "repeats": 1}
