"""Compile the budget's cases for absent GPUs: ``python -m bench.budget.aot --arch 80 --arch 90 --out FILE``.

The launchers of the package run on tensors without memory, for the GPU that ``assume`` names, and the launch is caught
where Triton would start it. So what is compiled has the divisibility, constants and options of a real launch. It is
a process of its own because compiling and Triton's interpreter cannot share one. PYTHONPATH may put another Triton in
front.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.budget import sass
from bench.budget.cases import CASES, Case
from florence_fast.errors import unknown
from florence_fast.files import write_json

Record = dict[str, Any]


class _Driver:
    """Stands for the driver of a GPU of some architecture, of which the compiler asks nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def recording(arch: int, kernels: set[str]) -> Iterator[list[Record]]:
    """Compile launches of ``kernels`` instead of running them, and none of the others.

    Yield what was compiled, once each: a call may launch the same code for one chunk after the other.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Record] = []
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self.fn.__name__ not in kernels:
            return None
        start = time.monotonic()
        compiled = real(self, *args, grid=grid, warmup=True, **options)
        if any(launched["compiled"] is compiled for launched in launches):
            return compiled
        launches.append({"name": self.fn.__name__, "compiled": compiled, "grid": list(grid), "start": start})
        launches[-1]["seconds"] = round(time.monotonic() - start, 2)
        return compiled

    driver.set_active(_Driver(arch))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = real


def launch(case: Case, arch: int) -> None:
    """Call the launcher of a case on tensors without memory."""
    import torch

    from florence_fast.kernels.targets import A100, H200, assume

    own = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.dtype, torch.float32)

    def empty(*sizes: int, dtype: torch.dtype = own) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    with assume({80: A100, 90: H200}[arch]):
        case.launch(empty)


def describe(launched: Record, arch: int) -> Record:
    """Say of one compiled kernel what the budget wants to know, in plain JSON."""
    compiled, meta = launched["compiled"], launched["compiled"].metadata
    source, text = compiled.src, _disassemble(compiled.asm["cubin"])
    instructions = sass.parse(text["-sass"])
    registers, stack = sass.resources(text["-res-usage"])
    names, calls = source.fn.arg_names, sass.returning_calls(instructions)
    return {
        "name": launched["name"],
        "grid": launched["grid"],
        "seconds": launched["seconds"],
        "num_warps": meta.num_warps,
        "num_stages": meta.num_stages,
        "maxnreg": meta.maxnreg,
        "shared": meta.shared,
        "registers": registers,
        "stack": stack,
        "signature": {name: str(kind) for name, kind in source.signature.items()},
        "constexprs": {names[path[0]]: str(value) for path, value in source.constants.items()},
        "attributes": {names[path[0]]: str(facts) for path, facts in source.attrs.items() if facts},
        **layouts(compiled.asm["ttgir"]),
        "instructions": len(instructions),
        "loops": [_loop(loop, arch, meta.num_warps, calls) for loop in sass.loops(instructions)],
        "outside": _count(sass.outside_loops(instructions), arch, meta.num_warps, calls),
    }


def layouts(ttgir: str) -> Record:
    """Say how the products are laid out over the warps, and each reduction along rows: its tile, and how that is.

    And which tiles in shared memory a wgmma may still read when the next trip begins, and something else reads too:
    Triton's pipeliner gives such a tile too few buffers (triton #6691).
    """
    declared = re.findall(r"(#\w+) = #ttg\.(\w+)<\{[^}]*?warpsPerCTA = \[([\d, ]+)\]", ttgir)
    warps = {name: [int(x) for x in text.split(",")] for name, _, text in declared}
    reductions = re.findall(
        r'"tt\.reduce"\([^)]*\) <\{axis = 1 : i32[^}]*\}> \(\{.*?\}\) : \(tensor<(\d+)x(\d+)x\w+, (#\w+)>',
        ttgir,
        re.DOTALL,
    )
    in_flight = re.findall(r"warp_group_dot_wait ([^{]*)\{pendings = [1-9]", ttgir)
    loaded = set(re.findall(r"ttg\.local_load (%\w+)", ttgir))
    return {
        "overwritten": sorted(loaded & set(re.findall(r"%\w+", " ".join(in_flight)))),
        "mma_warps": [warps[name] for name, kind, _ in declared if kind == "nvidia_mma"],
        "row_reductions": [
            {"tile": [int(rows), int(columns)], "warps": warps[name]} for rows, columns, name in sorted(set(reductions))
        ],
    }


def _disassemble(cubin: bytes) -> dict[str, str]:
    """Return what Triton's own cuobjdump prints of a cubin, by option."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = {}
        for option in ("-sass", "-res-usage"):
            done = subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True)
            shown[option] = done.stdout + done.stderr
    return shown


def _loop(loop: sass.Loop, arch: int, num_warps: int, calls: set[int]) -> Record:
    """Count what one trip of a loop does by itself, and the loops inside it."""
    own = _count(loop.own, arch, num_warps, calls)
    children = [_loop(child, arch, num_warps, calls) for child in loop.children]
    return {"head": hex(loop.head), **own, "children": children}


def _count(own: Sequence[sass.Instruction], arch: int, num_warps: int, calls: set[int]) -> Record:
    return {
        "num_warps": num_warps,
        "instructions": len(own),
        "clocks": sass.clocks(own, arch, num_warps),
        "multiply_adds": sum(sass.multiply_adds(i) for i in own if i.unit == "tensor") * num_warps,
        "units": dict(Counter(i.unit for i in own)),
        "opcodes": _opcodes(own),
        "calls": sum(i.address in calls for i in own),
    }


def _opcodes(instructions: Sequence[sass.Instruction]) -> dict[str, int]:
    """Count what the rules ask for by name: accesses to memory, products of matrices, and FFMA."""
    named = Counter(i.name for i in instructions if i.unit in ("lsu", "tensor"))
    ffma = sum(i.opcode == "FFMA" for i in instructions)
    return dict(named) | ({"FFMA": ffma} if ffma else {})


def compile_case(case: Case, arch: int) -> Record:
    """Compile and describe the kernels of one case; an error is told and stops no other case."""
    start = time.monotonic()
    found: Record = {"case": case.name, "arch": arch, "kernels": [], "error": None}
    try:
        with recording(arch, set(case.kernels)) as launches:
            launch(case, arch)
        found["kernels"] = [describe(launched, arch) for launched in launches]
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).strip()[-2000:]}"
    return found | {"seconds": round(time.monotonic() - start, 2)}


def main(args: list[str] | None = None) -> int:
    """Compile the cases in two processes and write one JSON; a line is printed for each that is done."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=[80, 90], help="may be repeated; both by default")
    parser.add_argument("--cases", help="names of cases with commas between them (all)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args(args)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is set, and under the interpreter nothing can be compiled: unset it", file=sys.stderr)
        return 2
    known = {case.name: case for case in CASES}
    names = [name.strip() for name in options.cases.split(",")] if options.cases else list(known)
    try:
        jobs = [(_case(name, known), arch) for name in names for arch in options.arch or (80, 90)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    import triton

    start = time.monotonic()
    entries = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in as_completed(pool.submit(compile_case, case, arch) for case, arch in jobs if arch in case.archs):
            entries.append(done.result())
            print(f"done {entries[-1]['case']} sm_{entries[-1]['arch']} {entries[-1]['seconds']} s", flush=True)
    order = {(case.name, arch): number for number, (case, arch) in enumerate(jobs)}
    entries.sort(key=lambda entry: order[entry["case"], entry["arch"]])
    compiles = sum(len(entry["kernels"]) for entry in entries)
    seconds = round(time.monotonic() - start, 1)
    write_json(
        options.out, {"triton": triton.__version__, "compiles": compiles, "seconds": seconds, "entries": entries}
    )
    return 0


def _case(name: str, known: dict[str, Case]) -> Case:
    if name not in known:
        raise unknown("case", name, known)
    return known[name]


if __name__ == "__main__":
    sys.exit(main())
