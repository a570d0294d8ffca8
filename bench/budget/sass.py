"""Read the machine code of a GPU kernel and say how long each unit of a multiprocessor needs for one trip of a loop.

Pure functions on the text of ``cuobjdump -sass`` and ``-res-usage``. Loops are the natural loops of the control flow;
both sides of a branch inside count. Rates are of one multiprocessor, which has four schedulers:

- issue: one instruction of a warp per scheduler and clock, whatever it does; the others are parts of it.
- fma: float32 multiply and add, 64 lanes a clock on sm_80 and 128 on sm_90, and the packed 16-bit ones, taken for as
  fast. An integer multiply-add sits in the same unit; it is *imad* by itself, too: 64 lanes a clock on both.
- alu: compare, select, minimum, logic, shift, permute, pack and convert between floats, add integers: 64 lanes.
- mufu: exp2, reciprocal, conversion between integer and float, bit counts: 16 lanes.
- tensor: products of matrices at the dense rate of 16-bit factors, 1,024 multiply-adds a clock on sm_80 and 2,048 on
  sm_90, half of it for TF32. On sm_90 it is HGMMA's rate; HMMA does not reach it there, and is counted by it too.
- lsu: the path that every access to memory and every shuffle takes, 128 bytes a clock: a clock for an instruction
  of up to 4 bytes a lane, 4 clocks for 16 bytes a lane, whether they lie in shared or in global memory. That lanes
  which read the same address share a clock is not known here: float32 products in FFMA look dearer than they are.
- shared: the bytes of shared memory alone, at 128 a clock, with what HGMMA reads for its factors.
- uniform: what a warp computes once for all lanes, taken for half a scheduler's rate; nothing is published about it.
- other: branches, barriers and waits. They take issue slots and nothing else here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PIPES = ("issue", "fma", "imad", "alu", "mufu", "tensor", "lsu", "shared", "uniform")

_UNITS = {
    "fma": "FFMA FMUL FADD HFMA2 HMUL2 HADD2",
    "imad": "IMAD IMUL",
    "alu": "BMSK CSEL F2FP FCHK FMNMX FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2FP I2IP IABS IADD IADD3 IMNMX ISETP LEA "
    "LOP LOP3 MOV P2R PLOP3 PRMT PSETP R2P SEL SGXT SHF VIADD VIADDMNMX VIMNMX VOTE",
    "mufu": "BREV F2F F2I FLO FRND I2F MUFU POPC",
    "tensor": "HGMMA HMMA",
    "lsu": "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED REDG SHFL ST STG STL STS STSM UTMALDG UTMASTG",
    "uniform": "R2UR REDUX S2UR UBMSK UCLEA UFLO UIADD3 UIMAD UISETP ULDC ULEA ULOP ULOP3 UMOV UP2UR UPLOP3 UPOPC "
    "UPRMT UPSETP UR2UP USEL USGXT USHF VOTEU",
    "other": "ARRIVES BAR BMOV BRA BREAK BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE JMP LDC "
    "LDGDEPBAR LEPC MEMBAR NANOSLEEP NOP RET S2R SYNCS UTMACMDFLUSH WARPGROUP WARPGROUPSET WARPSYNC YIELD",
}
UNIT_OF = {opcode: unit for unit, opcodes in _UNITS.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor of an architecture does in a clock."""

    fp32_lanes: int
    multiply_adds: int
    """Of 16-bit factors, by the tensor cores."""


RATES = {80: Rates(64, 1024), 90: Rates(128, 2048)}
_LANES = {"alu": 64, "imad": 64, "mufu": 16, "uniform": 64}
_SCHEDULERS, _WARP, _WARPS_OF_HGMMA, _BYTES_PER_CLOCK = 4, 32, 4, 128
_LEAVES = {"BRA", "JMP", "CALL", "EXIT", "RET"}
_SHARED = {"ATOMS", "LDGSTS", "LDS", "LDSM", "STS", "STSM", "UTMALDG", "UTMASTG"}


class UnknownOpcodes(ValueError):
    """Instructions that no unit is known for: counted as nothing they would make a kernel look fast."""


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: ``name`` with its modifiers, such as LDG.E.128."""

    address: int
    name: str
    operands: str
    guarded: bool = False

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def unit(self) -> str:
        return UNIT_OF[self.opcode]


@dataclass(frozen=True)
class Loop:
    """A loop: the instructions of its own, without those of the loops inside it."""

    head: int
    own: tuple[Instruction, ...]
    children: tuple["Loop", ...] = ()


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse(text: str) -> list[Instruction]:
    """Return the instructions of the one function in the text of ``cuobjdump -sass``.

    Raises:
        UnknownOpcodes: some are not in ``UNIT_OF``; all of them are named.
        ValueError: there is no instruction, or more than one function.
    """
    functions = re.findall(r"Function : (\S+)", text)
    if len(functions) > 1:
        raise ValueError(f"the text must hold one function, got {len(functions)}: {', '.join(functions)}")
    found = [
        Instruction(int(address, 16), name, operands.strip(), bool(guard))
        for address, guard, name, operands in _LINE.findall(text)
    ]
    if not found:
        raise ValueError("the text must hold machine code, got no instruction")
    unknown = sorted({instruction.name for instruction in found if instruction.opcode not in UNIT_OF})
    if unknown:
        raise UnknownOpcodes(f"no unit is known for {', '.join(unknown)}: add each to bench/budget/sass.py")
    return found


def resources(text: str) -> tuple[int, int]:
    """Return registers a thread and bytes of stack from the text of ``cuobjdump -res-usage``."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise ValueError(f"the text must hold REG and STACK, got {text[:200]!r}")
    return int(found[1]), int(found[2])


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Return the outermost loops in the order of their heads; those with one head are one loop."""
    blocks, edges = _control_flow(instructions)
    dominators = _dominators(edges)
    bodies: dict[int, set[int]] = {}
    for source in dominators:
        for head in edges[source]:
            if head in dominators[source]:
                bodies.setdefault(head, set()).update(_body(head, source, edges))
    return _nest(bodies, blocks, instructions)


def outside_loops(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Return what no loop holds, of what can be reached: it runs once a program, both sides of a branch counted."""
    blocks, edges = _control_flow(instructions)
    reached = [instructions[index] for block in sorted(_reachable(0, edges)) for index in blocks[block]]
    held, rest = set(), loops(instructions)
    while rest:
        loop = rest.pop()
        held |= {instruction.address for instruction in loop.own}
        rest.extend(loop.children)
    return [instruction for instruction in reached if instruction.address not in held]


def returning_calls(instructions: Sequence[Instruction]) -> set[int]:
    """Return the addresses of calls of a subroutine, whose instructions no loop holds.

    On sm_80 the compiler also leaves a loop by a call that never returns; such a call is a branch.
    """
    blocks, edges = _control_flow(instructions)
    block_at = {instructions[block.start].address: number for number, block in enumerate(blocks)}
    by_branch = [[] if instructions[b[-1]].opcode == "CALL" else edges[n] for n, b in enumerate(blocks)]
    found = set()
    for instruction in instructions:
        if instruction.opcode == "CALL":
            target = _target(instruction)
            reached = _reachable(block_at[target], by_branch) if target in block_at else ()
            if target is None or any(instructions[blocks[b][-1]].opcode == "RET" for b in reached):
                found.add(instruction.address)
    return found


def _target(instruction: Instruction) -> int | None:
    """Address that a branch or call goes to; None for any other instruction, and where a register holds it."""
    if instruction.opcode not in ("BRA", "JMP", "CALL"):
        return None
    found = re.search(r"(?:^|[\s,])0x([0-9a-f]+)\s*$", instruction.operands)
    if not found and instruction.opcode != "CALL":
        raise ValueError(f"a branch must name its target, got {instruction.name} {instruction.operands}")
    return int(found[1], 16) if found else None


def _control_flow(instructions: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Cut the code into blocks that are left at their end only; give each block's successors."""
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    targets = [_target(instruction) for instruction in instructions]
    starts = {0, *(index_of[target] for target in targets if target in index_of)}
    starts |= {index + 1 for index, instruction in enumerate(instructions) if instruction.opcode in _LEAVES}
    bounds = sorted(starts - {len(instructions)})
    blocks = [range(a, b) for a, b in zip(bounds, [*bounds[1:], len(instructions)], strict=True)]
    block_at = {block.start: number for number, block in enumerate(blocks)}
    edges: list[list[int]] = []
    for number, block in enumerate(blocks):
        last, target = instructions[block[-1]], targets[block[-1]]
        successors = [block_at[index_of[target]]] if target in index_of else []
        # A branch may carry its condition as an operand, as in BRA.DIV UR4, 0x120. What is called comes back.
        may_fall = last.opcode not in _LEAVES or last.opcode == "CALL" or last.guarded or "," in last.operands
        if may_fall and number + 1 < len(blocks):
            successors.append(number + 1)
        edges.append(successors)
    return blocks, edges


def _reachable(start: int, edges: list[list[int]]) -> list[int]:
    """Blocks that can be reached from ``start``, itself first."""
    order, stack = [start], [start]
    while stack:
        for successor in edges[stack.pop()]:
            if successor not in order:
                order.append(successor)
                stack.append(successor)
    return order


def _dominators(edges: list[list[int]]) -> dict[int, set[int]]:
    """Give for each block that can be reached those that every way to it goes through, itself among them."""
    order = _reachable(0, edges)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in edges[block]:
            before[successor].append(block)
    found = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            changed |= new != found[block]
            found[block] = new
    return found


def _body(head: int, source: int, edges: list[list[int]]) -> set[int]:
    """Blocks of the loop that the edge from ``source`` back to ``head`` closes."""
    before: dict[int, set[int]] = {}
    for block, successors in enumerate(edges):
        for successor in successors:
            before.setdefault(successor, set()).add(block)
    body, stack = {head}, [source]
    while stack:
        block = stack.pop()
        if block not in body:
            body.add(block)
            stack.extend(before.get(block, ()))
    return body


def _nest(bodies: dict[int, set[int]], blocks: list[range], instructions: Sequence[Instruction]) -> list[Loop]:
    """Build the tree of loops from the blocks of each."""
    inside = {h: {i for i, body in bodies.items() if i != h and body < bodies[h]} for h in bodies}

    def build(head: int) -> Loop:
        direct = [h for h in inside[head] if not any(h in inside[other] for other in inside[head])]
        own = sorted(bodies[head] - set().union(*(bodies[h] for h in direct)))
        return Loop(
            instructions[blocks[head].start].address,
            tuple(instructions[index] for block in own for index in blocks[block]),
            tuple(build(h) for h in sorted(direct)),
        )

    return [build(h) for h in sorted(bodies) if not any(h in others for others in inside.values())]


def clocks(instructions: Iterable[Instruction], arch: int, num_warps: int) -> dict[str, float]:
    """Return for each of ``PIPES`` the clocks that a program of ``num_warps`` warps needs for these instructions."""
    instructions, rates = list(instructions), RATES[arch]
    count = Counter(instruction.unit for instruction in instructions)
    found = {unit: count[unit] * _WARP / lanes for unit, lanes in _LANES.items()}
    found["issue"] = len(instructions) / _SCHEDULERS
    found["fma"] = (count["fma"] + count["imad"]) * _WARP / rates.fp32_lanes
    found["tensor"] = sum(multiply_adds(i) * _cost(i) for i in instructions if i.unit == "tensor") / rates.multiply_adds
    found["lsu"] = sum(access_bytes(i) for i in instructions if i.unit == "lsu") / _BYTES_PER_CLOCK
    found["shared"] = sum(_shared_bytes(i) for i in instructions) / _BYTES_PER_CLOCK
    return {pipe: found[pipe] * num_warps for pipe in PIPES}


def multiply_adds(instruction: Instruction) -> float:
    """Return the multiply-adds of a matrix instruction for one warp; one of HGMMA is the work of four warps."""
    if instruction.opcode == "HGMMA":
        m, n, k = _hgmma_shape(instruction)
        return m * n * k / _WARPS_OF_HGMMA
    # HMMA.16816 is 16 x 8 x 16, HMMA.1688 is 16 x 8 x 8.
    found = re.search(r"\.(16)(8)(16|8|4)\b", instruction.name)
    if not found:
        raise ValueError(f"a matrix instruction must name its shape, got {instruction.name}")
    return int(found[1]) * int(found[2]) * int(found[3])


def _hgmma_shape(instruction: Instruction) -> tuple[int, int, int]:
    found = re.search(r"\.(64)x(\d+)x(\d+)", instruction.name)
    if not found:
        raise ValueError(f"a matrix instruction must name its shape, got {instruction.name}")
    return int(found[1]), int(found[2]), int(found[3])


def _cost(instruction: Instruction) -> int:
    return 2 if ".TF32" in instruction.name else 1


def access_bytes(instruction: Instruction) -> int:
    """Return the bytes that a warp's access occupies the path of memory for, never less than one clock's."""
    if instruction.opcode in ("LDSM", "STSM"):
        matrices = re.search(r"\.M\w*88\.(\d)$", instruction.name)
        return (int(matrices[1]) if matrices else 1) * 128  # one matrix has 8 x 8 x 2 bytes
    width = re.search(r"\.(64|128)\b", instruction.name)
    return int(width[1]) // 8 * _WARP if width else _BYTES_PER_CLOCK


def _shared_bytes(instruction: Instruction) -> float:
    """Return the bytes of shared memory that an instruction of one warp reads or writes."""
    if instruction.opcode == "HGMMA":
        m, n, _ = _hgmma_shape(instruction)
        # A row of a factor is 32 bytes deep in any type. The first factor comes from registers if one is named.
        left_in_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
        return (n if left_in_registers else m + n) * 32 / _WARPS_OF_HGMMA
    return access_bytes(instruction) if instruction.opcode in _SHARED else 0
