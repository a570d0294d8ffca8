"""The static budget's arithmetic: what the compiled loops of a case need, the floors below it, and the rules.

Pure functions on the JSON of ``bench.aot``; a *row* is one case for one architecture and compiler.
"""

from dataclasses import asdict, dataclass
from typing import Any

from bench.budget_cases import ALLOWED, CASES, Case
from bench.sass import PIPES, RATES

Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """A GPU that the floors are computed for."""

    name: str
    bytes_per_clock: float
    """Memory bandwidth that one multiprocessor gets in a clock."""


MACHINES = {80: Machine("A100", 11.2), 90: Machine("H200", 18.5)}
_LAZY_PTXAS = 32
"""Registers that some long bodies are compiled to, with kilobytes of stack and without a warning."""


def rows_of(compiled: dict[str, Any]) -> list[Row]:
    """Return one row for each entry in the JSON of ``bench.aot``."""
    cases = {case.name: case for case in CASES}
    return [_row(cases[entry["case"]], entry, compiled["triton"]) for entry in compiled["entries"]]


def _row(case: Case, entry: Row, triton: str) -> Row:
    arch, machine, rates = entry["arch"], MACHINES[entry["arch"]], RATES[entry["arch"]]
    kernels = [_kernel(case, kernel) for kernel in entry["kernels"]]
    share = case.edge_share
    inner, edge = (_sum([kernel[kind] for kernel in kernels]) for kind in ("inner", "edge"))
    pipes = {pipe: inner["clocks"][pipe] * (1 - share) + edge["clocks"][pipe] * share for pipe in PIPES}
    busiest = max(pipes, key=pipes.__getitem__)
    memory = case.bytes / machine.bytes_per_clock
    tensor_rate = {"fp32": rates.fp32_lanes, "tf32": rates.multiply_adds / 2}.get(case.dtype, rates.multiply_adds)
    return {
        **{"case": case.name, "arch": arch, "machine": machine.name, "triton": triton, "error": entry["error"]},
        **{name: getattr(case, name) for name in ("window", "head_dim", "dtype", "direction", "shifted", "safe_dots")},
        **{name: getattr(case, name) for name in ("size", "heads", "bytes", "flops", "exp2", "tier")},
        "edge_share": share,
        "limits": asdict(case.limits),
        "allowed": ALLOWED.get(case.name, {}),
        "kernels": kernels,
        "instructions": inner["instructions"],
        "edge_instructions": edge["instructions"],
        "pipes": pipes,
        "busiest": busiest,
        "memory_floor": memory,
        "product_floor": case.flops / 2 / tensor_rate,
        "exp2_floor": case.exp2 / 16,
        "ratio": pipes[busiest] / memory,
        "binds": busiest if pipes[busiest] > memory else "memory",
        "clocks": max(pipes[busiest], memory),
    }


def _kernel(case: Case, kernel: Row) -> Row:
    """Sum up one kernel: what it needs for one inner and for one edge window."""
    blocks = int(kernel["constexprs"].get("BLOCKS", 1))
    programs = blocks if case.kernels[kernel["name"]] else 1
    loops = [_trip(loop, blocks) for loop in kernel["loops"] if _works(loop)]
    zero = _sum([])
    inner, edge = (loops[0] if loops else zero), (loops[1] if len(loops) > 1 else zero)
    facts = ("name", "grid", "num_warps", "num_stages", "maxnreg", "registers", "stack", "shared", "mma_warps")
    pointers = {name for name, kind in kernel["signature"].items() if kind.startswith("*")}
    divisible = {name for name, facts in kernel["attributes"].items() if "['tt.divisibility', 16]" in facts}
    return {
        **{name: kernel[name] for name in (*facts, "row_reductions", "seconds")},
        "signature": ", ".join(f"{name}: {kind}" for name, kind in kernel["signature"].items() if kind != "constexpr"),
        "constexprs": ", ".join(f"{name}={value}" for name, value in kernel["constexprs"].items()),
        "divisible_by_16": sorted(divisible),
        "unknown_pointers": sorted(pointers - divisible),
        "programs_a_window": programs,
        "window_loops": len(loops),
        "inner": _scale(inner, programs),
        "edge": _scale(edge, programs),
    }


def _works(loop: Row) -> bool:
    """Say whether a loop, or one inside it, multiplies matrices: only a loop over windows or rows does."""
    return _multiply_adds(loop) > 0 or any(_works(child) for child in loop["children"])


def _multiply_adds(loop: Row) -> int:
    """Multiply-adds of a trip; many FFMA are a product, few the arithmetic around one."""
    ffma = loop["opcodes"].get("FFMA", 0) * 32 * loop["num_warps"]
    return loop["multiply_adds"] or (ffma if loop["opcodes"].get("FFMA", 0) >= 256 else 0)


def _trip(loop: Row, blocks: int) -> Row:
    """Sum up one trip: the loop over blocks of rows inside it runs ``blocks`` times, any other once."""
    own = {name: loop[name] for name in ("instructions", "clocks", "opcodes", "calls")}
    parts = [own | {"multiply_adds": _multiply_adds(loop)}]
    parts += [_scale(_trip(child, 1), blocks if _works(child) else 1) for child in loop["children"]]
    return _sum(parts)


def _sum(parts: list[Row]) -> Row:
    opcodes: dict[str, int] = {}
    for part in parts:
        for name, count in part["opcodes"].items():
            opcodes[name] = opcodes.get(name, 0) + count
    counts = ("instructions", "multiply_adds", "calls")
    return {
        **{name: sum(part[name] for part in parts) for name in counts},
        "clocks": {pipe: sum(part["clocks"][pipe] for part in parts) for pipe in PIPES},
        "opcodes": opcodes,
    }


def _scale(part: Row, factor: float) -> Row:
    return _sum([part] * int(factor))


def broken_rules(report: dict[str, Any], strict: bool = False) -> list[str]:
    """Return every rule that a row of the report breaks, one line each; ``strict`` knows no allowance."""
    found = []
    for row in [*report["rows"], *report.get("other_rows", [])]:
        limits = row["limits"] | ({} if strict else row["allowed"])
        found += [f"{title(row)}: {text}" for text in _broken({**row, "limits": limits})]
    return found


def title(row: Row) -> str:
    """What a row is about, in words."""
    return f"{row['case']}, sm_{row['arch']}, Triton {row['triton']}"


def _broken(row: Row) -> list[str]:
    """Return what is wrong with one row; an error hides the rest."""
    if row["error"]:
        return [f"it does not compile: {row['error']}"]
    wanted = set(next(case for case in CASES if case.name == row["case"]).kernels)
    missing = wanted - {kernel["name"] for kernel in row["kernels"]}
    if missing:
        return [f"not launched: {', '.join(sorted(missing))}"]
    found = _broken_numbers(row)
    for kernel in row["kernels"]:
        found += [f"{kernel['name']}: {text}" for text in (*_broken_code(row, kernel), *_broken_loads(row, kernel))]
    return found


def _broken_numbers(row: Row) -> list[str]:
    """Instructions, clocks, and whether the loops that were found do the case's work."""
    limits, found = row["limits"], []
    if limits["instructions"] is not None and row["instructions"] > limits["instructions"]:
        found.append(f"{row['instructions']} instructions a warp and window, at most {limits['instructions']}")
    for pipe, clocks in row["pipes"].items():
        if limits["of_memory"] is not None and clocks > row["memory_floor"] * limits["of_memory"]:
            part = f"{clocks / row['memory_floor']:.0%} of what memory takes, at most {limits['of_memory']:.0%}"
            found.append(f"{pipe} needs {clocks:,.0f} clocks a window, {part}")
    done = sum(kernel["inner"]["multiply_adds"] for kernel in row["kernels"]) * 2
    # Padding to tiles of 16 x 64 multiplies in vain, at worst (64 / 49)^2 times; a loop that was unrolled, or counted
    # as something else, is off by 2.
    if not 1 <= done / row["flops"] < 2.5:
        found.append(f"its loops hold {done:,.0f} FLOP a window, and the formula says {row['flops']:,}")
    return found


def _broken_code(row: Row, kernel: Row) -> list[str]:
    """Stack, registers, loops, tensor instructions and layouts of one kernel."""
    limits, found = row["limits"], []
    if kernel["stack"] > limits["stack"]:
        found.append(f"{kernel['stack']} bytes of stack, at most {limits['stack']}")
    if kernel["registers"] == _LAZY_PTXAS and kernel["stack"]:
        found.append(f"{_LAZY_PTXAS} registers and {kernel['stack']} bytes of stack: ptxas has given up on it")
    if kernel["window_loops"] != 1 + row["shifted"]:
        found.append(f"{kernel['window_loops']} loops over windows, not {1 + row['shifted']}")
    for kind in ("inner", "edge") if row["shifted"] else ("inner",):
        opcodes = kernel[kind]["opcodes"]
        tensor = any(name.split(".")[0] in ("HMMA", "HGMMA") for name in opcodes)
        if row["dtype"] == "fp32" and (tensor or "FFMA" not in opcodes):
            found.append(f"the {kind} loop of exact float32 products must hold FFMA and no tensor instruction")
        if row["dtype"] != "fp32" and not tensor:
            found.append(f"the {kind} loop holds no tensor instruction")
        if kernel[kind]["calls"]:
            found.append(f"the {kind} loop calls a subroutine, which is not counted")
    for reduction in kernel["row_reductions"]:
        if reduction["warps"][1] > 1 and reduction["tile"][0] > limits["split_rows"]:
            tile = "x".join(map(str, reduction["tile"]))
            found.append(f"rows of a {tile} tile are reduced across {reduction['warps'][1]} warps")
    return found


def _broken_loads(row: Row, kernel: Row) -> list[str]:
    """Width of the loads from global memory in one kernel's loops, and what the compiler knew of its pointers."""
    found = []
    for kind in ("inner", "edge") if row["shifted"] else ("inner",):
        wide = total = 0.0
        for name, count in kernel[kind]["opcodes"].items():
            if name.split(".")[0] in ("LDG", "LDGSTS", "UTMALDG"):
                if any(part in ("U8", "S8", "U16", "S16") for part in name.split(".")):
                    found.append(f"the {kind} loop loads by {name}")
                size = _load_bytes(name)
                wide, total = wide + count * size * (size == 16), total + count * size
        if not total or wide / total < row["limits"]["wide_share"]:
            part = f"{wide / total:.0%}" if total else "none"
            found.append(f"the {kind} loop loads {part} by 16 bytes, at least {row['limits']['wide_share']:.0%}")
    if kernel["unknown_pointers"]:
        found.append(f"not known to be divisible by 16: {', '.join(kernel['unknown_pointers'])}")
    return found


def _load_bytes(name: str) -> int:
    """Bytes a thread of a load; the copy engine (UTMALDG) counts as wide."""
    parts = name.split(".")
    return 16 if "128" in parts or parts[0] == "UTMALDG" else 8 if "64" in parts else 4
