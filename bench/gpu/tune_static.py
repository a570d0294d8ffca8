"""What the static budget says of launch configurations: ``python -m bench.gpu.tune_static --arch 90 --out FILE``.

Every kernel that asks for a ``Config`` in a case of the budget is compiled with each candidate, as ``bench.budget.aot``
compiles it, and a candidate is dropped that ptxas refuses, that needs more shared memory than a multiprocessor has,
that spills where the default does not, or whose code and grid another has already. What is compiled stays in Triton's
cache on disk, so a launch on a GPU of that architecture finds it there. It is a process of its own, for the reason that
``bench.budget.aot`` has.

The file has one JSON a line: first the plan, all keys in the order in which they come, then the verdicts of each.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.budget.aot import describe, launch, recording
from bench.budget.cases import ALLOWED, CASES, Case

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What a program may have, by the compute capability's table in NVIDIA's CUDA C++ Programming Guide."""

ROOT = Path(__file__).parents[2]

Verdict = dict[str, Any]


def plan(arch: int, kernels: set[str] | None = None) -> list[tuple[str, str, str]]:
    """Return (kernel, key, case's name) of each pair of kernel and key, bfloat16 first; ``kernels`` are all by default.

    Nothing is compiled. Exact float32 and tf32 have one key, and float32 is exact by default.
    """
    from florence_fast.kernels.configs import watched

    order = {"bf16": 0, "fp16": 1, "fp32": 2}
    found: dict[tuple[str, str], str] = {}
    chosen = [case for case in CASES if arch in case.archs and case.dtype in order]
    with recording(arch, set()):
        for case in sorted(chosen, key=lambda case: order[case.dtype]):
            with watched() as requests:
                launch(case, arch)
            for request in requests:
                if kernels is None or request.kernel in kernels:
                    found.setdefault((request.kernel, request.key), case.name)
    return [(*pair, case) for pair, case in found.items()]


def verdicts(kernel: str, key: str, name: str, arch: int, most: int | None = None) -> Verdict:
    """Compile one kernel of a case with its default and with ``most`` candidates, and say what is wrong with which."""
    from florence_fast.kernels.configs import watched
    from florence_fast.kernels.configs.search import candidates

    case = next(case for case in CASES if case.name == name)
    with recording(arch, set()), watched() as requests:
        launch(case, arch)
    default = next(r.default for r in requests if (r.kernel, r.key) == (kernel, key))
    usual = compiled_with(case, arch, kernel, default)
    limits = {**asdict(case.limits), **ALLOWED.get(case.name, {}), **ALLOWED.get(f"{case.name}, sm_{arch}", {})}
    stack = max(limits["stack"], usual.get("stack", 0))
    rows, seen = [{"config": asdict(default), **usual, "reason": None}], {usual.get("code")}
    for config in candidates(default)[:most]:
        found = compiled_with(case, arch, kernel, config)
        reason = excluded(found, arch, stack, seen)
        seen.add(found.get("code"))
        rows.append({"config": asdict(config), **found, "reason": reason})
    return {"kernel": kernel, "key": key, "case": name, "rows": rows}


def compiled_with(case: Case, arch: int, kernel: str, config: Any) -> Verdict:
    """Return the most that the kernels of a case take, and a digest of code and grids; or the error."""
    from florence_fast.kernels.configs import forced

    try:
        with recording(arch, set(case.kernels)) as launches, forced(kernel, config):
            launch(case, arch)
        found = [describe(launched, arch) for launched in launches]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
    code = hashlib.sha256(repr([(x["grid"], x["num_warps"]) for x in found]).encode())
    for launched in launches:
        code.update(launched["compiled"].asm["cubin"])
    most = {name: max(kernel[name] for kernel in found) for name in ("registers", "stack", "shared")}
    return {**most, "code": code.hexdigest()[:12]}


def excluded(found: Verdict, arch: int, stack: int, seen: Collection[str | None] = ()) -> str | None:
    """Return why a candidate needs no measurement, or None.

    Args:
        found: what ``compiled_with`` said of it.
        arch: the architecture, which says how much shared memory there is.
        stack: how many bytes a thread may spill.
        seen: digests of what is measured already.
    """
    if "error" in found:
        return found["error"]
    if found["shared"] > SHARED_BYTES[arch]:
        return f"{found['shared']:,} bytes of shared memory, at most {SHARED_BYTES[arch]:,}"
    if found["stack"] > stack:
        return f"{found['stack']} bytes of stack, at most {stack}"
    return "the same code as another" if found["code"] in seen else None


class Exclusions:
    """The verdicts of a child process, which compiles while its parent measures what it has compiled already."""

    def __init__(self, arch: int, finished: Collection[tuple[str, str]] = (), words: Collection[str] = ()) -> None:
        """Start the child for everything but the ``finished`` pairs of kernel and key; ``words`` go to its command."""
        self.folder = tempfile.TemporaryDirectory()
        self.out, skip = Path(self.folder.name, "verdicts.jsonl"), Path(self.folder.name, "finished.json")
        skip.write_text(json.dumps(sorted(finished)), encoding="utf-8")
        command = [sys.executable, "-m", "bench.gpu.tune_static", "--arch", str(arch), "--out", str(self.out)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with Path(self.folder.name, "log").open("w", encoding="utf-8") as log:
            self.child = subprocess.Popen(
                [*command, "--finished", str(skip), *words],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def read(self) -> tuple[set[tuple[str, str]] | None, dict[tuple[str, str], list[Verdict]]]:
        """Return the pairs that the child has planned, None before it has, and the verdicts so far."""
        text = self.out.read_text(encoding="utf-8") if self.out.exists() else ""
        head, *lines = text[: text.rfind("\n") + 1].splitlines() or [None]
        if head is None:
            return None, {}
        found = [json.loads(line) for line in lines]
        return {tuple(pair) for pair in json.loads(head)["plan"]}, {(v["kernel"], v["key"]): v["rows"] for v in found}

    def of(self, kernel: str, key: str, seconds: float) -> dict[Any, str]:
        """Return the excluded configurations of a kernel with the reasons, waiting for them at most so long."""
        from florence_fast.kernels.configs import Config

        end = time.monotonic() + seconds
        while True:
            ended = self.child.poll() is not None
            planned, found = self.read()
            if (kernel, key) in found:
                return {Config(**row["config"]): row["reason"] for row in found[kernel, key] if row["reason"]}
            if ended or time.monotonic() > end or (planned is not None and (kernel, key) not in planned):
                return {}
            time.sleep(0.05)

    def wait(self, seconds: float) -> int:
        """Wait for the child's end and return how many candidates it has compiled.

        Raises:
            RuntimeError: it failed; the message is what it printed last.
            subprocess.TimeoutExpired: it took longer.
        """
        if self.child.wait(timeout=seconds) != 0:
            said = Path(self.folder.name, "log").read_text(encoding="utf-8", errors="replace").splitlines()
            raise RuntimeError("\n".join(["bench.gpu.tune_static failed", *said[-15:]]))
        return sum(len(rows) for rows in self.read()[1].values())

    def close(self) -> None:
        """End the child, wherever it is."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        self.folder.cleanup()


def main(args: list[str] | None = None) -> int:
    """Write the plan and then the verdicts, a line each, as they come in the order of the plan."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune_static", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_BYTES), required=True)
    parser.add_argument("--kernels", help="kernels with commas between them (all)")
    parser.add_argument("--finished", type=Path, help="JSON list of pairs of kernel and key that are left out")
    parser.add_argument("--most", type=int, help="so many keys, and of each so many candidates (all)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args(args)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is set, and under the interpreter nothing can be compiled: unset it", file=sys.stderr)
        return 2
    left_out = json.loads(options.finished.read_text(encoding="utf-8")) if options.finished else []
    jobs = plan(options.arch, set(options.kernels.split(",")) if options.kernels else None)
    jobs = [job for job in jobs if list(job[:2]) not in left_out][: options.most]
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) - 4), 12)
    with options.out.open("w", encoding="utf-8") as file:
        print(json.dumps({"plan": [job[:2] for job in jobs]}), file=file, flush=True)
        if workers <= 1:
            for job in jobs:
                print(json.dumps(verdicts(*job, options.arch, options.most)), file=file, flush=True)
            return 0
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rest = ([options.arch] * len(jobs), [options.most] * len(jobs))
            for found in pool.map(verdicts, *zip(*jobs, strict=True), *rest):
                print(json.dumps(found), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
