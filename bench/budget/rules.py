"""The static budget's arithmetic: what the compiled loops of a case need, the floors below it, and the rules.

Pure functions on the JSON of ``bench.budget.aot``; a *row* is one case for one architecture and compiler.
"""

import itertools
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.budget.cases import ALLOWED, CASES, Case
from bench.budget.ops.base import Weight
from bench.budget.sass import PIPES, RATES

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
    """Return one row for each entry in the JSON of ``bench.budget.aot``."""
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
        **{field.name: getattr(case, field.name) for field in fields(case) if field.name not in ("limits", "archs")},
        **{
            name: getattr(case, name)
            for name in (
                *("op", "unit", "measured_as", "sizes", "bytes", "accesses"),
                *("flops", "exp2", "loops", "edge_share"),
            )
        },
        "limits": asdict(case.limits),
        "allowed": ALLOWED.get(case.name, {}) | ALLOWED.get(f"{case.name}, sm_{arch}", {}),
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
    """Sum up one kernel: what it needs for one inner and for one edge unit."""
    weight = case.weight(kernel)
    units = [] if weight is None else _units(case, kernel, weight)
    inner, edge = (*units, _sum([]), _sum([]))[:2]
    facts = ("name", "grid", "num_warps", "num_stages", "maxnreg", "registers", "stack", "shared", "mma_warps")
    pointers = {name for name, kind in kernel["signature"].items() if kind.startswith("*")}
    divisible = {name for name, facts in kernel["attributes"].items() if "['tt.divisibility', 16]" in facts}
    return {
        **{name: kernel[name] for name in (*facts, "row_reductions", "overwritten", "seconds")},
        "signature": ", ".join(f"{name}: {kind}" for name, kind in kernel["signature"].items() if kind != "constexpr"),
        "constexprs": ", ".join(f"{name}={value}" for name, value in kernel["constexprs"].items()),
        "divisible_by_16": sorted(divisible),
        "unknown_pointers": sorted(pointers - divisible),
        "weight": None if weight is None else asdict(weight),
        "unit_loops": len(units),
        "inner": inner,
        "edge": edge,
    }


def _units(case: Case, kernel: Row, weight: Weight) -> list[Row]:
    """Sum up each kind of unit that the kernel's outermost loops do, inner ones first: an edge unit needs more."""
    products = case.flops > 0
    steps = [loop for loop in kernel["loops"] if _works(loop, products)]
    if weight.body:
        loops = [[loop] for loop in steps] if case.loops > 1 else [kernel["loops"]]
        steps = [{**kernel["outside"], "children": children} for children in loops]
    units = sorted((_step(loop, weight, products) for loop in steps), key=lambda unit: unit["instructions"])
    if weight.parts:
        found = units[::-1] if len(units) == len(weight.parts) else []
        parts = [_scale(unit, part / case.loops) for unit, part in zip(found, weight.parts, strict=False)]
        units = [_sum(parts)] * case.loops if parts else []
    return [_scale(unit, weight.times) for unit in units]


def _works(loop: Row, products: bool) -> bool:
    """Say whether a loop, or one inside it, does the work: multiplies matrices, or loads rows in an op without."""
    own = _multiply_adds(loop) > 0 if products else _loaded(loop["opcodes"])[1] > 0
    return own or any(_works(child, products) for child in loop["children"])


def _multiply_adds(loop: Row) -> int:
    """Multiply-adds of a trip; many FFMA are a product, few the arithmetic around one."""
    ffma = loop["opcodes"].get("FFMA", 0) * 32 * loop["num_warps"]
    return loop["multiply_adds"] or (ffma if loop["opcodes"].get("FFMA", 0) >= 256 else 0)


def _step(loop: Row, weight: Weight, products: bool) -> Row:
    """Sum up one trip of a loop: of the loops inside it each that works runs as often as ``weight`` says."""
    own = {name: loop[name] for name in ("instructions", "clocks", "opcodes", "calls")}
    parts = [own | {"multiply_adds": _multiply_adds(loop) if products else 0}]
    for child in loop["children"]:
        innermost = not any(_works(grandchild, products) for grandchild in child["children"])
        works = _works(child, products)
        trips = (weight.inner if innermost else weight.outer) if works else 1
        parts.append(_scale(_step(child, weight, products), trips))
        if works and innermost:
            parts.append(_scale(_copies(child), -min(weight.early, trips)))
    return _sum(parts)


def _copies(loop: Row) -> Row:
    """What the asynchronous copies of a trip move; what is left of one that copies nothing is its issue slot."""
    opcodes = {name: count for name, count in loop["opcodes"].items() if name.startswith("LDGSTS")}
    clocks = sum(_access_bytes(name) * count for name, count in opcodes.items()) * 32 / 128 * loop["num_warps"]
    moved = {pipe: clocks if pipe in ("lsu", "shared") else 0.0 for pipe in PIPES}
    return {**dict.fromkeys(_COUNTS, 0), "clocks": moved, "opcodes": opcodes}


def _sum(parts: list[Row]) -> Row:
    opcodes: dict[str, float] = {}
    for part in parts:
        for name, count in part["opcodes"].items():
            opcodes[name] = opcodes.get(name, 0) + count
    return {
        **{name: sum(part[name] for part in parts) for name in _COUNTS},
        "clocks": {pipe: sum(part["clocks"][pipe] for part in parts) for pipe in PIPES},
        "opcodes": opcodes,
    }


_COUNTS = ("instructions", "multiply_adds", "calls")


def _scale(part: Row, factor: float) -> Row:
    return {
        **{name: part[name] * factor for name in _COUNTS},
        **{name: {key: value * factor for key, value in part[name].items()} for name in ("clocks", "opcodes")},
    }


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
    wanted = Counter(next(case for case in CASES if case.name == row["case"]).kernels)
    missing = wanted - Counter(kernel["name"] for kernel in row["kernels"])
    if missing:
        return [f"not launched: {', '.join(sorted(missing))}"]
    found = _broken_numbers(row)
    for kernel in row["kernels"]:
        hot = () if kernel["weight"] is None else (_broken_code, _broken_accesses)
        found += [f"{kernel['name']}: {text}" for rule in (_broken_resources, *hot) for text in rule(row, kernel)]
    return found


def _broken_numbers(row: Row) -> list[str]:
    """Instructions, clocks, and whether the loops that were found do the case's work."""
    limits, unit, found = row["limits"], row["unit"], []
    if limits["instructions"] is not None and row["instructions"] > limits["instructions"]:
        found.append(f"{row['instructions']} instructions a warp and {unit}, at most {limits['instructions']}")
    floors = {
        "of_memory": (row["memory_floor"], "memory takes"),
        "of_exp2": (exp2_floor(row), "exp2 or memory takes"),
    }
    for (limit, (floor, what)), (pipe, clocks) in itertools.product(floors.items(), row["pipes"].items()):
        if limits[limit] is not None and clocks > floor * limits[limit]:
            part = f"{clocks / floor:.0%} of what {what}, at most {limits[limit]:.0%}"
            found.append(f"{pipe} needs {clocks:,.0f} clocks a {unit}, {part}")
    if limits["tensor_share"] is not None and tensor_share(row) < limits["tensor_share"]:
        part = f"{tensor_share(row):.0%} of what binds ({row['binds']}), at least {limits['tensor_share']:.0%}"
        found.append(f"the tensor cores need {row['pipes']['tensor']:,.0f} clocks a {unit}, {part}")
    # Tiles that stand out over the work do some in vain: 16 x 64 against 49 x 49 (64 / 49)^2 times. A loop that was
    # unrolled, or counted as something else, is off by 2.
    if row["flops"]:
        done, wanted, what = sum(k["inner"]["multiply_adds"] for k in row["kernels"]) * 2, row["flops"], "FLOP"
    else:
        done, wanted, what = sum(_moved(kernel) for kernel in row["kernels"]), row["accesses"], "bytes"
    if not 1 <= done / wanted < limits["padding"]:
        found.append(f"its loops hold {done:,.0f} {what} a {unit}, and the formula says {wanted:,}")
    return found


def tensor_share(row: Row) -> float:
    """Return what the tensor cores need as a part of what binds, memory included."""
    return row["pipes"]["tensor"] / max(*row["pipes"].values(), row["memory_floor"])


def exp2_floor(row: Row) -> float:
    """Return the clocks of the exponentials, or of memory where it takes longer."""
    return max(row["exp2_floor"], row["memory_floor"])


def _broken_resources(row: Row, kernel: Row) -> list[str]:
    """Stack and registers of one kernel."""
    limits, found = row["limits"], []
    if kernel["stack"] > limits["stack"]:
        found.append(f"{kernel['stack']} bytes of stack, at most {limits['stack']}")
    if kernel["registers"] == _LAZY_PTXAS and kernel["stack"]:
        found.append(f"{_LAZY_PTXAS} registers and {kernel['stack']} bytes of stack: ptxas has given up on it")
    return found


def _broken_code(row: Row, kernel: Row) -> list[str]:
    """Loops, tensor instructions and layouts of one kernel."""
    limits, found = row["limits"], []
    if kernel["unit_loops"] != row["loops"]:
        found.append(f"{kernel['unit_loops']} loops over {row['unit']}s, not {row['loops']}")
    for kind in _kinds(row):
        opcodes = kernel[kind]["opcodes"]
        tensor = any(name.split(".")[0] in ("HMMA", "HGMMA") for name in opcodes)
        if row["dtype"] == "fp32" and row["flops"] and (tensor or "FFMA" not in opcodes):
            found.append(f"the {kind} loop of exact float32 products must hold FFMA and no tensor instruction")
        if row["dtype"] != "fp32" and row["flops"] and not tensor:
            found.append(f"the {kind} loop holds no tensor instruction")
        if kernel[kind]["calls"] > limits["calls"]:
            found.append(f"the {kind} loop calls a subroutine, which is not counted")
    if kernel["overwritten"]:
        found.append(f"a wgmma may still read {', '.join(kernel['overwritten'])} when the next trip overwrites it")
    for reduction in kernel["row_reductions"] if limits["split_rows"] is not None else ():
        if reduction["warps"][1] > 1 and reduction["tile"][0] > limits["split_rows"]:
            tile = "x".join(map(str, reduction["tile"]))
            found.append(f"rows of a {tile} tile are reduced across {reduction['warps'][1]} warps")
    return found


def _kinds(row: Row) -> tuple[str, ...]:
    """Kinds of units whose loops the kernels of a row have."""
    return ("inner", "edge")[: row["loops"]]


def _broken_accesses(row: Row, kernel: Row) -> list[str]:
    """Width of the accesses to global memory in one kernel's loops, and what the compiler knew of its pointers."""
    found = []
    for kind in _kinds(row):
        opcodes = kernel[kind]["opcodes"]
        for name in opcodes:
            if name.split(".")[0] in _LOADS and _access_bytes(name) < row["limits"]["load_bytes"]:
                found.append(f"the {kind} loop loads by {name}")
        wide, total = _loaded(opcodes)
        if not total or wide / total < row["limits"]["wide_share"]:
            part = f"{wide / total:.0%}" if total else "none"
            found.append(f"the {kind} loop loads {part} by 16 bytes, at least {row['limits']['wide_share']:.0%}")
        narrow = row["limits"]["store_bytes"]
        stores = sorted(n for n in opcodes if n.split(".")[0] in _STORES and _access_bytes(n) < narrow)
        if stores:
            found.append(f"the {kind} loop stores by {', '.join(stores)}, at least {narrow} bytes a thread")
    if kernel["unknown_pointers"]:
        found.append(f"not known to be divisible by 16: {', '.join(kernel['unknown_pointers'])}")
    return found


_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_STORES = ("STG",)


def _loaded(opcodes: dict[str, float]) -> tuple[float, float]:
    """Bytes a thread that loads of 16 bytes bring, and those that all loads bring."""
    sizes = [(_access_bytes(name), count) for name, count in opcodes.items() if name.split(".")[0] in _LOADS]
    return sum(size * count for size, count in sizes if size == 16), sum(size * count for size, count in sizes)


def _moved(kernel: Row) -> float:
    """Bytes that one unit loads from global memory and stores there, all threads together."""
    opcodes = kernel["inner"]["opcodes"].items()
    threads = kernel["num_warps"] * 32
    return sum(_access_bytes(n) * count for n, count in opcodes if n.split(".")[0] in (*_LOADS, *_STORES)) * threads


def _access_bytes(name: str) -> int:
    """Bytes a thread of a load or store; the copy engine (UTMALDG) counts as wide."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = [sizes[part] for part in name.split(".") if part in sizes]
    return 16 if name.startswith("UTMALDG") else found[0] if found else 4
