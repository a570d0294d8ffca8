"""The stages of a run on a GPU, in order of value: each may be stopped, and goes on at the next start."""

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bench.ops
from bench.gpu import models, pretraining, tune_search
from bench.harness import run_op
from bench.machine import PACKAGES, ROOT, copy_bandwidth, matrix_rate, smi, version
from bench.session import OpBench, OutOfTime, Session, dtypes_of

Details = dict[str, Any]


class StageFailed(Exception):
    """A stage found something wrong; the message says what, the details are stored."""

    def __init__(self, message: str, details: Details | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


class StageSkipped(Exception):
    """A stage cannot run here; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One step of the run."""

    name: str
    what: str
    run: Callable[[Session], Details]
    once: bool = True
    """Not run again after it has ended well; others know themselves what is left to do."""
    always: bool = False
    """Run whichever stages are asked for: the others need it."""


def environment(session: Session) -> Details:
    """Versions, what nvidia-smi knows, and the two rates that every row is set beside."""
    session.copy_rate = copy_bandwidth(session.device, small=session.plan.rehearse)
    session.matrix_rate = matrix_rate(session.device, small=session.plan.rehearse)
    fields = ("driver_version", "clocks.max.sm", "clocks.sm", "clocks.mem", "temperature.gpu", "power.limit")
    details = {
        **session.facts,
        "packages": {package: version(package) for package in PACKAGES},
        "nvidia_smi": smi(*fields),
        "copy_bytes_per_second": session.copy_rate,
        "matrix_flops_per_second": session.matrix_rate,
    }
    session.show(f"  {session.facts['device']}, driver {session.facts['driver']}, {details['nvidia_smi']}")
    session.show(f"  copy {session.copy_rate / 1e9:,.0f} GB/s, product {session.matrix_rate / 1e12:,.2f} TFLOP/s")
    session.show(f"  {details['packages']}")
    return details


def correctness(session: Session) -> Details:
    """The tests that need a GPU, in a child process; without pytest the checks of ``florence-fast verify``."""
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    details: Details = {"absent": absent}
    limit = 3600 if session.plan.rehearse else 240  # a rehearsal costs no time of a GPU, and the machine may be busy
    if absent:
        session.show(
            f"  {' and '.join(absent)} not installed: the checks of florence-fast verify stand in for the tests"
        )
    else:
        tests = ["tests/ops"] if session.plan.rehearse else ["tests"]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests]
        details["pytest"] = child(session, "pytest", command, limit=limit)
    if absent or session.plan.rehearse:
        code = (
            "import sys; from florence_fast.verify import verify; from florence_fast.files import write_json; "
            "found = verify(sys.argv[1], seeds=(0,), seconds=0, show=print); write_json(sys.argv[2], found); "
            "print([row for row in found['checks'] if not row['passed']]); sys.exit(not found['passed'])"
        )
        command = [sys.executable, "-c", code, session.device.type, str(session.logs / "verify.json")]
        details["verify"] = child(session, "verify", command, limit=limit)
    return details


def self_test(session: Session) -> Details:
    """Whether the transposed product that a fault of Triton breaks on Hopper is right on this device."""
    if importlib.util.find_spec("triton") is None:
        raise StageSkipped("triton is not installed")
    from bench.gpu import self_test as kernel

    if session.device.type == "cuda":
        dtypes, widths, windows = (torch.bfloat16, torch.float16, torch.float32), kernel.WIDTHS, (7, 8, 12)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        # The interpreter multiplies bfloat16 as raw bits.
        dtypes, widths, windows = (torch.float16, torch.float32), (32,), (7,)
    else:
        raise StageSkipped("without a GPU Triton needs TRITON_INTERPRET=1, set before it is imported")
    rows = kernel.run(session.device.type, dtypes, widths)
    wrong = [row for row in rows if not row["right"]]
    session.show(f"  dot(trans(dot)) is right in {len(rows) - len(wrong)} of {len(rows)} forms")
    for row in wrong:
        session.show(f"  WRONG: {row}")
    ours = kernel.run_backwards(session.device, dtypes, windows)
    for row in ours:
        session.show(f"  backward {row['window']}x{row['window']} {row['dtype']}: fast form {row['verdict']}")
    # A compiler with the fault is a finding about the device and not a failure of ours: the safe form is for it.
    return {"unsafe_form_is_right": not wrong, "forms": rows, "backwards": ours}


DTYPES = ("bf16", "fp16", "fp32")
"""The one that models run in first."""
STATUSES = ("timed", "missing", "wrong", "error")


def measure(op: OpBench) -> Callable[[Session], Details]:
    """Return the stage that times an op beside its competitors, in the first dtype that it takes."""

    def run(session: Session) -> Details:
        # The interpreter has no bfloat16.
        first = next(iter(op.SHAPES.values()))
        run_op(op, session, ("fp32",) if session.plan.rehearse else dtypes_of(op, first, DTYPES)[:1])
        return judged(session, [op])

    return run


def other_dtypes(session: Session) -> Details:
    """Time every op in the dtypes that its stage has left out; of a rehearsal all rows are there already."""
    for op in ops():
        run_op(op, session, ("fp32",) if session.plan.rehearse else DTYPES)
    return judged(session, ops())


def judged(session: Session, of: list[OpBench]) -> Details:
    """Count the rows of some ops by how they ended.

    Raises:
        StageFailed: there are some with wrong values or an error.
    """
    names = {op.OP for op in of}
    ended = [row["status"] for row in session.store.rows.values() if row["stage"] in names]
    counts = {status: ended.count(status) for status in STATUSES}
    if counts["wrong"] or counts["error"]:
        raise StageFailed(f"{counts['wrong']} rows with wrong values, {counts['error']} with an error", counts)
    return counts


def demo(session: Session) -> Details:
    """The demo on CUDA: what it takes there, and that it reads the unseen artist as well as on a CPU."""
    if session.plan.rehearse:
        raise StageSkipped("`make test` runs the demo's steps on a CPU by itself")
    needed = ("rich", "typer", "PIL", "matplotlib", "tokenizers", "safetensors", "huggingface_hub", "tqdm")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise StageSkipped(f"not installed: {', '.join(absent)}")
    from florence_fast.demo import run

    if "device" not in inspect.signature(run).parameters:
        raise StageSkipped("this version's demo runs on the CPU only")
    out = ROOT / "runs" / "demo-gpu"
    words = ["demo", "--device", "cuda", "--resume", "--out", str(out)]
    details = child(session, "demo", [sys.executable, "-m", "florence_fast", *words], limit=420)
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    figures = {name: found[name] for name in ("seconds", "images_per_second", "steps", "device")}
    return {**details, **figures, "top1": found["zero_shot"]["top1"]}


def child(session: Session, name: str, command: list[str], limit: float) -> Details:
    """Run a command in the checkout with a time limit; what it prints goes to the file ``name``.log.

    Raises:
        OutOfTime: the run's own limit came first.
        StageFailed: it exited with an error, or took longer than ``limit``.
    """
    left = session.clock.left()
    log = session.logs / f"{name}.log"
    session.show(f"  running {name}, at most {min(left, limit):.0f} s; it prints into {log}")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=max(1, min(left, limit)))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            if left < limit:
                raise OutOfTime from error
            raise StageFailed(f"took more than {limit:.0f} s", {"tail": tail(log)}) from error
    details = {"exit_code": code, "tail": tail(log)}
    session.show(f"  exit code {code}: {details['tail'][-1] if details['tail'] else ''}")
    if code != 0:
        raise StageFailed(f"exit code {code}", details)
    return details


def tail(log: Path) -> list[str]:
    """Return the last lines of a file."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]


def ops() -> list[OpBench]:
    """Return the files of bench/ops, the most valuable first."""
    found = [importlib.import_module(f"bench.ops.{module.name}") for module in pkgutil.iter_modules(bench.ops.__path__)]
    return sorted(found, key=lambda op: op.PLACE)


def stages() -> list[Stage]:
    """Return the stages in the order in which they run."""
    return [
        Stage("environment", "versions, clocks, copy bandwidth and matrix rate", environment, once=False, always=True),
        Stage("correctness", "the tests marked gpu, or the checks of florence-fast verify", correctness),
        Stage("self_test", "whether this Triton multiplies a transposed product right here", self_test),
        *(Stage(op.OP, op.WHAT, measure(op), once=False) for op in ops()),
        Stage("tune", "the launch configuration of each kernel, found by measurement", tune_search.run, once=False),
        Stage("inference", "Swin and CoSwin: images a second, MFU, peak memory", models.inference, once=False),
        Stage("training", "the same, forward and backward", models.training, once=False),
        Stage("pretraining", "a step at the paper's batch by the gradient cache", pretraining.run, once=False),
        Stage("first_call", "first features in a fresh process, Triton's cache empty, then full", models.first_call),
        Stage("other_dtypes", "every op in float16 and float32 too", other_dtypes, once=False),
        Stage("demo", "pretraining of florence_nano on CUDA", demo),
    ]
