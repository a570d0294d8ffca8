"""Check in two minutes that the ops are correct and fast on this machine.

Each op runs against its reference in float64, forward and backward, in each dtype; the error of the plain computation
in that dtype decides how much is allowed (see ``compare``). Then each is timed beside its rivals on the same tensors.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from florence_fast.ops import OPS
from florence_fast.ops.cases import Case, Function, Inputs, Subject
from florence_fast.ops.dispatch import choose
from florence_fast.provenance import provenance
from florence_fast.timing import Timing, time_calls
from florence_fast.verify.compare import Judgement, joined, judge, results
from florence_fast.verify.timing import MODES, call_in_mode

__all__ = ["Judgement", "Subject", "Timing", "subjects", "verify"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEEDS = (0, 1, 2)
SECONDS = 1.0
"""How long each entry of the table of times is measured."""

Show = Callable[[str], None]


def subjects() -> dict[str, Subject]:
    """Return what is verified, by the name of the op."""
    found = {name: op.subject() for name, op in OPS.items()}
    return {name: subject for name, subject in found.items() if subject is not None}


def verify(
    device: str | None = None,
    *,
    seeds: tuple[int, ...] = SEEDS,
    seconds: float = SECONDS,
    compile: bool = False,
    show: Show = lambda line: None,
) -> dict[str, Any]:
    """Check every op against float64, and time it.

    Args:
        device: "cpu" or "cuda"; a GPU if there is one.
        seeds: of the draws; the errors of all are joined by root mean square.
        seconds: how long each time is measured; 0 leaves the times out.
        compile: time torch.compile of the plain computation too.
        show: is told what is being done.

    Returns:
        "checks": one row for each op, case and dtype, with its backend, "passed" and every error and limit, or with
        the "reason" why it was not run (passed is None) or failed; "times": rows of seconds; "passed": whether
        something ran and all of it passed; the seeds, and what ``provenance`` says.

    >>> verify("cpu", seconds=0)["passed"]
    True
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = list(subjects().values())
    checks = []
    for subject in chosen:
        for case in subject.checked:
            for dtype in DTYPES:
                show(f"{subject.op}, {case.name}, {dtype}")
                checks.append(check(subject, case, dtype, device, seeds))
    times = []
    if seconds:
        for subject in chosen:
            show(f"{subject.op}: times")
            times += measure(subject, device, seeds[0], seconds, compile)
    ran = [row["passed"] for row in checks if row["passed"] is not None]
    passed = bool(ran) and all(ran)
    return {"passed": passed, "device_type": device, "seeds": seeds, "checks": checks, "times": times, **provenance()}


def check(subject: Subject, case: Case, dtype: str, device: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Compare one op in one dtype with float64, over all seeds."""
    row: dict[str, Any] = {"op": subject.op, "case": case.name, "dtype": dtype, "backend": None, "passed": None}
    try:
        row["backend"] = choose_backend(subject.op, case.make(DTYPES[dtype], device, seeds[0]))
    except RuntimeError as error:
        return {**row, "reason": str(error)}
    try:
        judgements = joined(draw(subject, case.make(DTYPES[dtype], device, seed)) for seed in seeds)
    except Exception as error:  # whatever a kernel does on this machine is a finding, and the other rows count too
        return {**row, "passed": False, "reason": f"{type(error).__name__}: {error}"}
    passed = all(judgement.passed for judgement in judgements)
    return {**row, "passed": passed, "results": [judgement.to_dict() for judgement in judgements]}


def draw(subject: Subject, inputs: Inputs) -> list[Judgement]:
    """Judge one draw of one case."""
    function = functools.partial(OPS[subject.op].function, **inputs.options)
    found = results(function, inputs.tensors, inputs.grad_out)
    plain = results(subject.rivals["eager"](inputs), inputs.tensors, inputs.grad_out)
    return judge(found, plain, exact_results(subject.op, inputs))


def exact_results(op: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Run the op's reference in float64."""
    reference = functools.partial(OPS[op].reference, **inputs.options)
    return results(reference, inputs.tensors, inputs.grad_out, torch.float64)


def choose_backend(op: str, inputs: Inputs) -> str:
    """Return the backend that the op takes for these inputs.

    Raises:
        RuntimeError: the forced backend cannot run them.
    """
    return choose(op, **inputs.tensors, **inputs.options)


def measure(subject: Subject, device: str, seed: int, seconds: float, compile: bool) -> list[dict[str, Any]]:
    """Time the op beside its rivals in one dtype: bfloat16 on a GPU, float32 on a CPU."""
    kind = torch.device(device).type
    dtype = "bfloat16" if kind == "cuda" else "float32"
    case = subject.timed[kind]
    inputs = case.make(DTYPES[dtype], device, seed)
    try:
        ours = f"ours ({choose_backend(subject.op, inputs)})"
    except RuntimeError:
        return []  # the checks say why
    functions: dict[str, Function] = {ours: functools.partial(OPS[subject.op].function, **inputs.options)}
    functions |= {name: build(inputs) for name, build in subject.rivals.items()}
    if compile:
        functions["torch.compile"] = torch.compile(functions["eager"], dynamic=False)
    rows = []
    for mode in (mode for mode in MODES if mode != "backward"):
        calls = {name: [call_in_mode(f, inputs.tensors, inputs.grad_out, mode)] for name, f in functions.items()}
        timings = time_calls(calls, torch.device(device), seconds)
        for name, timing in timings.items():
            row = {"op": subject.op, "case": case.name, "dtype": dtype, "mode": mode, "implementation": name}
            rows.append({**row, "median": timing.median, "q20": timing.q20, "q80": timing.q80})
    return rows
