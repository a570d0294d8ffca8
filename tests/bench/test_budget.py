"""The budget holds for the kernels as they are compiled now, and each of its rules can be seen to fail."""

import ast
import copy
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.budget import aot, chart
from bench.budget import command as budget
from bench.budget.cases import ALLOWED, CASES, LEFT_OUT, select
from bench.budget.chart import draw
from bench.budget.rules import broken_rules, rows_of
from bench.budget.sass import PIPES
from bench.gpu import stages
from tests.counts import COUNTS

ROOT = Path(__file__).parents[2]
SIZES_2D = "B: i32, H: i32, W: i32, num_heads: i32"


@pytest.fixture(scope="session")
def checked(tmp_path_factory, pytestconfig):
    """Compile the quick cases once; give the exit code of --check, the report and what was printed."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("budget") / "budget.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "bench.budget", "--check", "--json", str(path)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert path.is_file(), done.stdout + done.stderr
    report = json.loads(path.read_text("utf-8"))
    pytestconfig.stash[COUNTS]["kernels compiled for A100 and H200"] = report["compiles"]
    return done.returncode, report, done.stdout


@pytest.fixture
def report(checked):
    """A copy of the report that a test may spoil."""
    return copy.deepcopy(checked[1])


def row_of(report, name, arch=80):
    return next(row for row in report["rows"] if row["case"] == name and row["arch"] == arch)


@pytest.mark.aot
class TestCompiledKernels:
    def test_every_rule_holds(self, checked):
        code, report, printed = checked
        assert report["broken"] == broken_rules(report) == [], printed
        assert code == 0
        assert "every rule holds" in printed

    def test_each_quick_case_is_there_for_each_architecture(self, checked):
        found = [(row["case"], row["arch"]) for row in checked[1]["rows"]]
        assert sorted(found) == sorted((case.name, arch) for case in select("quick") for arch in case.archs)

    def test_few_enough_are_compiled_for_make_test(self, checked):
        kernels = sum(len(case.kernels) * len(case.archs) for case in select("quick"))
        assert kernels * 2 <= 96
        assert checked[1]["compiles"] == kernels * len(checked[1]["triton"])

    def test_every_op_with_cases_has_quick_ones(self):
        assert {case.op for case in select("quick")} == {case.op for case in CASES}

    def test_what_is_compiled_is_what_a_launch_compiles(self, checked):
        for row in [*checked[1]["rows"], *checked[1]["other_rows"]]:
            for kernel in row["kernels"]:
                pointers = [word.split(":")[0] for word in kernel["signature"].split(", ") if ": *" in word]
                assert pointers and set(kernel["divisible_by_16"]) >= set(pointers)
                if row["op"] != "window_attention":
                    continue
                assert kernel["divisible_by_16"] == sorted(pointers), "no size may be specialised"
                sizes = "tokens: i32, num_windows: i32, num_heads: i32" if "_long_" in kernel["name"] else SIZES_2D
                assert sizes in kernel["signature"], "a new map must not compile"
                assert not any(".U16" in name for kind in ("inner", "edge") for name in kernel[kind]["opcodes"])
        [kernel] = row_of(checked[1], "7x7 d32 bf16 forward shifted", 90)["kernels"]
        assert kernel["constexprs"].startswith("WH=7, WW=7, D=32, N_PAD=64")
        assert kernel["constexprs"].endswith("PRECISION=ieee, HAS_EDGES=True")
        assert kernel["grid"][0] % 3 == 0, "a program has one of the three heads"

    def test_the_table_names_every_case_and_what_waits_for_a_gpu(self, checked):
        printed = checked[2]
        assert all(row["case"] in printed for row in checked[1]["rows"])
        assert "not yet" in printed or any(row["measured_clocks"] for row in checked[1]["rows"])

    def test_a_summary_gives_the_same_charts_and_predictions(self, checked):
        rows = json.loads(budget.format_summary(checked[1]))["rows"]
        for wanted in (chart._is_window, chart._is_long, chart._is_other):
            assert [wanted(row) for row in rows] == [wanted(row) for row in checked[1]["rows"]]
        figures = ("case", "arch", "clocks", "pipes", "busiest")
        assert [[row[x] for x in figures] for row in rows] == [[row[x] for x in figures] for row in checked[1]["rows"]]
        assert [chart.floor(row) for row in rows] == [chart.floor(row) for row in checked[1]["rows"]]

    def test_charts_are_drawn_small_enough_for_a_readme(self, checked, tmp_path):
        paths = draw(checked[1]["rows"], tmp_path)
        names = [f"{name}_{gpu}.png" for gpu in ("a100", "h200") for name in ("budget", "budget_long", "budget_ops")]
        assert [path.name for path in paths] == names
        for path in paths:
            assert path.read_bytes().startswith(b"\x89PNG")
            assert 20_000 < path.stat().st_size < 300_000


def slow_down(pipe):
    def change(row, kernel):
        row["pipes"][pipe] = row["memory_floor"] * 1.001

    return change


def set_pipe(pipe, clocks):
    return lambda row, kernel: row["pipes"].update({pipe: clocks})


def set_row(**values):
    return lambda row, kernel: row.update(values)


def set_kernel(**values):
    return lambda row, kernel: kernel.update(values)


def without(*opcodes):
    def change(row, kernel):
        kept = {name: n for name, n in kernel["inner"]["opcodes"].items() if name.split(".")[0] not in opcodes}
        kernel["inner"]["opcodes"] = kept

    return change


def with_opcode(name, count=1):
    return lambda row, kernel: kernel["inner"]["opcodes"].update({name: count})


def too_busy(pipe):
    """Let the tensor cores need half of what another unit needs, less than any allowance."""

    def change(row, kernel):
        row["pipes"][pipe] = row["pipes"]["tensor"] / 0.5
        row.update(binds=pipe)

    return change


def lose_last(row, kernel):
    row["kernels"].pop()


def spill_last(row, kernel):
    row["kernels"][-1]["stack"] = 24


def spill_more(row, kernel):
    row["kernels"][-1]["stack"] = 40


WINDOW, WINDOW_BACKWARD = "7x7 d32 bf16 forward shifted", "7x7 d32 bf16 backward shifted"
LONG, LONG_BACKWARD = "8x7x7 d32 bf16 forward", "8x7x7 d32 bf16 backward"
CONTRASTIVE, LAYER_NORM = "contrastive_loss D512 bf16 forward", "layer_norm C96 bf16 forward"
SPLIT = [{"tile": [64, 64], "warps": [1, 4]}]
BROKEN = [
    ("too many instructions", WINDOW, set_row(instructions=401), "401 instructions a warp and window"),
    ("backward's instructions", WINDOW_BACKWARD, set_row(instructions=761), "761 instructions .* at most 760"),
    *((f"{p} over memory", WINDOW, slow_down(p), f"{p} needs 1,1") for p in PIPES),
    ("a stack in the forward", WINDOW, set_kernel(stack=8), "8 bytes of stack, at most 0"),
    ("a stack in the backward", WINDOW_BACKWARD, set_kernel(stack=64), "64 bytes of stack, at most 63"),
    ("32 registers", WINDOW_BACKWARD, set_kernel(registers=32, stack=8), "ptxas has given up"),
    ("no tensor instruction", WINDOW, without("HMMA", "HGMMA"), "holds no tensor instruction"),
    ("float32 on tensor cores", "7x7 d32 fp32 forward", with_opcode("HMMA.1688.F32.TF32"), "no tensor instruction"),
    ("float32 without FFMA", "7x7 d32 fp32 forward", without("FFMA"), "must hold FFMA"),
    ("loads of 2 bytes", WINDOW, with_opcode("LDG.E.U16"), "the inner loop loads by LDG.E.U16"),
    ("loads of 4 bytes", WINDOW, with_opcode("LDG.E", 8), "loads 75% by 16 bytes, at least 100%"),
    ("no loads", WINDOW, without("LDG", "LDGSTS"), "loads none by 16 bytes"),
    ("rows across warps", WINDOW, set_kernel(row_reductions=SPLIT), "rows of a 64x64 tile .* 4 warps"),
    ("a tile overwritten", WINDOW, set_kernel(overwritten=["%x_7"]), "a wgmma may still read %x_7 when the next trip"),
    ("a lost loop", WINDOW, set_kernel(unit_loops=1), "1 loops over windows, not 2"),
    ("an unaligned pointer", WINDOW, set_kernel(unknown_pointers=["qkv_ptr"]), "divisible by 16: qkv"),
    ("stores of 2 bytes", WINDOW, with_opcode("STG.E.U16"), "stores by STG.E.U16, at least 4 bytes"),
    ("a kernel not launched", LONG_BACKWARD, lose_last, "not launched: .*grad"),
    ("few tensor clocks", CONTRASTIVE, too_busy("alu"), "the tensor cores need 8,192 .* 50% of what binds .alu"),
    ("memory over tensor", CONTRASTIVE, lambda row, _: row.update(memory_floor=9e5), "1% of what binds"),
    ("exp2 over its floor", LONG, set_pipe("mufu", 9604 * 1.83), "mufu needs 17,575 .* 183% of what exp2 .* most 181%"),
    ("memory over exp2", LONG_BACKWARD, set_pipe("lsu", 34440 * 3.07), "lsu needs 105,731 .* 307% of what exp2 or mem"),
    ("a long window's instructions", LONG, set_row(instructions=15007), "15007 instructions .* at most 15006"),
    ("a byte loaded in a long window", LONG, with_opcode("LDG.E.U8"), "the inner loop loads by LDG.E.U8"),
    ("a stack in a long backward", LONG_BACKWARD, spill_more, "_bias_grad_kernel: 40 bytes of stack, at most 32"),
    ("a lost loop of several", LONG_BACKWARD, set_kernel(unit_loops=0), "0 loops over windows, not 1"),
    ("a form not launched", "contrastive_loss D512 bf16 gradient", lose_last, "not launched: .*grad"),
    ("a form that is not hot", "contrastive_loss D512 bf16 gradient", spill_last, "_grad_kernel: 24 bytes of stack"),
    ("rows slower than memory", LAYER_NORM, slow_down("fma"), "fma needs 34 clocks a row, 100% of what memory takes"),
    ("rows stored by 8 bytes", LAYER_NORM, with_opcode("STG.E.64"), "stores by STG.E.64, at least 16 bytes a thread"),
    ("rows loaded by 8 bytes", LAYER_NORM, with_opcode("LDG.E.64"), "loads .* by 16 bytes, at least 100%"),
    ("rows loaded twice", LAYER_NORM, with_opcode("LDG.E.128", 0.25), "loops hold 768 bytes a row, .* says 384"),
    ("a stack over rows", LAYER_NORM, set_kernel(stack=8), "8 bytes of stack, at most 0"),
    ("no loop over rows", LAYER_NORM, set_kernel(unit_loops=0), "0 loops over rows, not 1"),
    ("an error", WINDOW, set_row(error="PTXASError: no"), "does not compile: PTXASError: no"),
]  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize(("case", "change", "message"), [x[1:] for x in BROKEN], ids=[x[0] for x in BROKEN])
def test_a_broken_rule_is_told(report, case, change, message):
    row = row_of(report, case)
    change(row, row["kernels"][0])
    said = broken_rules(report)
    assert any(re.match(rf"{case}, sm_80, Triton \S+: .*{message}", line) for line in said), said


@pytest.mark.aot
def test_a_subroutine_and_lost_work_are_told(report):
    row = row_of(report, WINDOW, 90)
    row["kernels"][0]["inner"]["calls"] = 1
    row["kernels"][0]["inner"]["multiply_adds"] *= 2
    said = " ".join(broken_rules(report))
    assert "calls a subroutine, which is not counted" in said
    assert "its loops hold 1,048,576 FLOP a window, and the formula says 307,328" in said
    row["kernels"][0]["inner"]["multiply_adds"] //= 4
    assert "its loops hold 262,144 FLOP a window" in " ".join(broken_rules(report))


@pytest.mark.aot
def test_the_tail_of_16_rows_may_lie_across_the_warps_and_64_rows_may_not(report):
    [kernel] = row_of(report, "12x12 d32 bf16 forward shifted")["kernels"]
    kernel["row_reductions"] = [{"tile": [16, 128], "warps": [1, 4]}]
    assert broken_rules(report) == []
    kernel["row_reductions"] = [{"tile": [64, 128], "warps": [1, 4]}]
    assert len(broken_rules(report)) == 1


@pytest.mark.aot
def test_an_allowance_goes_no_further_than_it_says(report):
    assert set(broken_rules(report, strict=True)) >= set(report["allowed"])
    for arch, allowed in ((80, {"of_exp2": 3.06}), (90, {"of_exp2": 1.33, "stack": 128})):
        row, limit = row_of(report, LONG_BACKWARD, arch), allowed["of_exp2"]
        assert row["allowed"] == allowed
        row["pipes"]["lsu"] = max(row["memory_floor"], row["exp2_floor"]) * limit * 1.001
        [line] = broken_rules(report)
        assert line.startswith(f"{LONG_BACKWARD}, sm_{arch}, ")
        row["pipes"]["lsu"] = 0.0


def test_every_allowance_is_of_a_case_and_a_limit():
    cases = {case.name: case for case in CASES}
    assert len(cases) == len(CASES), "two cases have one name"
    for name, allowed in ALLOWED.items():
        case, _, arch = name.partition(", sm_")
        assert set(allowed) <= set(vars(cases[case].limits))
        assert not arch or int(arch) in cases[case].archs


def test_every_kernel_is_in_some_case_or_left_out_for_a_reason():
    launched, defined = set(), set()
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                defined.add(node.name)
            # A launch names its grid in brackets: kernel[grid](...).
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    kernels = launched & defined
    assert {name for name in defined if name.endswith("_kernel")} == kernels, "a kernel is a function of that name"
    held = {name for case in CASES for name in case.kernels}
    assert held <= kernels, "a case names a kernel that nothing launches"
    assert kernels - held == set(LEFT_OUT), "give a kernel a case, or leave it out for a reason"
    assert all(LEFT_OUT.values())


def loop(instructions=10, multiply_adds=0, children=(), ffma=0, clocks=1.0):
    return {
        "head": "0x0", "num_warps": 4, "instructions": instructions, "multiply_adds": multiply_adds, "calls": 0,
        "clocks": dict.fromkeys(PIPES, clocks), "opcodes": {"FFMA": ffma}, "units": {}, "children": list(children),
    }  # fmt: skip


def compiled(case, *kernels):
    shared = {
        "grid": [1], "num_warps": 4, "num_stages": 2, "maxnreg": None, "registers": 99, "stack": 0, "shared": 0,
        "mma_warps": [], "row_reductions": [], "overwritten": [], "seconds": 0.1,
        "signature": {"qkv_ptr": "*bf16", "B": "i32"}, "attributes": {"qkv_ptr": "[['tt.divisibility', 16]]"},
    }  # fmt: skip
    entry = {"case": case, "arch": 90, "error": None, "kernels": [{**shared, **kernel} for kernel in kernels]}
    return {"triton": "0.0", "entries": [entry]}


def test_the_loop_that_needs_less_is_that_of_the_inner_windows():
    loops = [loop(200, 10), loop(100, 10)]
    kernel = {"name": "_window_attention_fwd_kernel", "constexprs": {}, "loops": loops}
    [row] = rows_of(compiled("7x7 d32 bf16 forward shifted", kernel))
    assert (row["instructions"], row["edge_instructions"]) == (100, 200)


LONG_TILES = {"BLOCKS": "7", "CHUNKS": "6", "TAIL": "16", "WIDTH": "64", "ROWS": "64"}


def long_kernels(*loops):
    """The kernels of the backward of 8x7x7, each with its loops; outside of them are 5 instructions."""
    names = [f"_window_attention_long_{name}_kernel" for name in ("dq", "dkdv", "bias_grad")]
    facts = {"constexprs": LONG_TILES, "outside": loop(5)}
    return [{"name": n, "loops": x, **facts} for n, x in zip(names, loops, strict=True)]


def test_blocks_chunks_and_tiles_of_a_long_window_are_multiplied():
    first_apart, all_chunks = loop(900, 20, [loop(300, 10)]), loop(250, 5, [loop(400, 10)])
    tail, wide = loop(30, 3), loop(80, 10)
    [row] = rows_of(compiled("8x7x7 d32 bf16 backward", *long_kernels([first_apart], [all_chunks], [tail, wide])))
    assert [kernel["inner"]["instructions"] for kernel in row["kernels"]] == [
        5 + 7 * (900 + 5 * 300),
        5 + 7 * (250 + 6 * 400),
        7 * 6 * 80 + 7 * 30,
    ]
    assert [kernel["unit_loops"] for kernel in row["kernels"]] == [1, 1, 1]
    assert row["exp2_floor"] == 3 * 392**2 / 16
    # Fifteen streams of 392 tokens in 16 bits, and six float32 statistics a row.
    assert row["memory_floor"] == (15 * 392 * 32 * 2 + 6 * 392 * 4) / 18.5


def test_a_lost_loop_over_tiles_is_no_unit():
    one = [loop(900, 20, [loop(300, 10)])]
    [row] = rows_of(compiled("8x7x7 d32 bf16 backward", *long_kernels(one, one, [loop(80, 10)])))
    assert [kernel["unit_loops"] for kernel in row["kernels"]] == [1, 1, 0]


def test_inner_and_edge_windows_that_share_a_loop_are_half_of_it_each():
    edge, inner = loop(700, 0, [loop(90, 10)]), loop(600, 0, [loop(60, 10)])
    kernels = long_kernels([edge, inner], [edge, inner], [loop(30, 3), loop(80, 10)])
    [row] = rows_of(compiled("8x7x7 d32 bf16 backward shifted", *kernels))
    dq, dkdv, bias = row["kernels"]
    assert dq["inner"]["instructions"] == 5 + 7 * (600 + 5 * 60), "one of the two loops, and what is outside of both"
    assert dkdv["edge"]["instructions"] == 5 + 7 * (700 + 6 * 90)
    assert bias["inner"] == bias["edge"]
    assert bias["inner"]["instructions"] == (7 * 6 * 80 + 7 * 30) / 2
    assert row["edge_share"] == 1 - 1 * 7 * 7 / (2 * 8 * 8)


def test_chunks_that_were_unrolled_are_in_the_loop_over_blocks():
    kernel = {"name": "_window_attention_long_fwd_kernel", "loops": [loop(1600, 10)], "outside": loop(500)}
    [row] = rows_of(compiled("8x7x7 d32 bf16 forward", {**kernel, "constexprs": LONG_TILES}))
    assert row["instructions"] == 500 + 7 * 1600


def test_edge_windows_are_weighted_by_their_share_of_the_map():
    loops = [loop(2, clocks=9.0), loop(100, 10, clocks=100.0), loop(200, 10, clocks=200.0)]
    [row] = rows_of(
        compiled(
            "7x7 d32 bf16 forward shifted", {"name": "_window_attention_fwd_kernel", "constexprs": {}, "loops": loops}
        )
    )
    assert row["edge_share"] == 15 / 64
    assert (row["instructions"], row["edge_instructions"]) == (100, 200)
    assert row["pipes"]["issue"] == 100 * 49 / 64 + 200 * 15 / 64
    assert row["memory_floor"] == 4 * 49 * 32 * 2 / 18.5
    assert row["binds"] == "memory" and row["clocks"] == row["memory_floor"]


def test_blocks_of_rows_and_programs_a_window_are_multiplied():
    main = loop(50, 0, [loop(100, 10, clocks=7.0), loop(3, clocks=0.5)])
    sums = loop(200, 10)
    names = ("_window_attention_tall_bwd_kernel", "_window_attention_tall_bias_grad_kernel")
    kernels = [
        {"name": n, "constexprs": {"BLOCKS": "3"}, "loops": [x]} for n, x in zip(names, (main, sums), strict=True)
    ]
    [row] = rows_of(compiled("12x12 d32 bf16 backward", *kernels))
    assert [kernel["inner"]["instructions"] for kernel in row["kernels"]] == [50 + 3 * 100 + 3, 3 * 200]
    assert row["pipes"]["alu"] == 1 + 3 * 7 + 0.5 + 3
    # Eleven streams of 144 tokens in 16 bits, and four float32 statistics a row.
    assert row["memory_floor"] == (11 * 144 * 32 * 2 + 4 * 144 * 4) / 18.5


def tiles_of(loops, outside=None, name="_contrastive_loss_fwd_kernel", **constants):
    blocks = {"BLOCK_R": "128", "BLOCK_N": "128", "BLOCK_D": "64"}
    return {"name": name, "constexprs": blocks | constants, "loops": loops, "outside": outside, "num_stages": 1}


def test_a_loop_over_depth_inside_one_over_tiles_is_multiplied():
    outer = loop(50, 0, [loop(100, 10, clocks=7.0), loop(3, clocks=0.5)])
    [row] = rows_of(compiled("contrastive_loss D512 bf16 forward", tiles_of([outer])))
    assert row["instructions"] == 50 + 8 * 100 + 3
    assert row["pipes"]["alu"] == 1 + 8 * 7 + 0.5
    [row] = rows_of(compiled("contrastive_loss D512 bf16 forward", tiles_of([outer], BLOCK_N="256")))
    assert row["instructions"] == (50 + 8 * 100 + 3) / 2, "a tile twice as wide is two units"


def test_a_body_without_an_outer_loop_is_counted_whole_and_a_form_that_is_not_hot_not_at_all():
    kernel = tiles_of([loop(100, 10)], loop(70), "_contrastive_loss_grad_kernel", FAR_APART="False")
    cold = tiles_of([loop(999, 10)], loop(999), "_contrastive_loss_grad_kernel", FAR_APART="True")
    [row] = rows_of(compiled("contrastive_loss D512 bf16 gradient", kernel, cold))
    assert row["instructions"] == 70 + 8 * 100
    assert [kernel["unit_loops"] for kernel in row["kernels"]] == [1, 0]


def test_copies_that_begin_before_a_loop_are_not_made_twice():
    inner = loop(100, 10, clocks=100.0)
    inner["opcodes"] = {"LDGSTS.E.BYPASS.128": 4}
    outer = loop(50, 0, [inner])
    outer["opcodes"] = {"LDGSTS.E.BYPASS.128": 8}
    [row] = rows_of(compiled("contrastive_loss D512 bf16 forward", {**tiles_of([outer]), "num_stages": 3}))
    assert row["kernels"][0]["inner"]["opcodes"]["LDGSTS.E.BYPASS.128"] == 8 * 4
    # 4 copies a lane, 16 bytes each, by 4 warps at 128 bytes a clock; in two trips they do not happen.
    assert row["pipes"]["lsu"] == row["pipes"]["shared"] == 1 + 8 * 100 - 2 * 4 * 16 * 32 * 4 / 128
    assert row["pipes"]["issue"] == 1 + 8 * 100


def test_a_first_block_before_the_loop_over_the_others_is_multiplied():
    first, others = loop(100, 10), loop(30, 0, [loop(90, 10)])
    constants = {"BLOCK_M": "128", "BLOCK_N": "64", "BLOCK_N2": "0", "BLOCK_K": "64"}
    kernel = tiles_of([first, others], loop(70), "_patch_merging_fwd_kernel", **constants)
    [row] = rows_of(compiled("patch_merging C192 bf16 forward", {**kernel, "grid": [128 * 14 * 14 // 128 * 2]}))
    # 2C = 384 columns are six blocks, three for each of two programs; 4C = 768 deep in twelve trips.
    assert row["instructions"] == (70 + 12 * 100 + 2 * (30 + 12 * 90)) * 2 / 128


def test_rows_are_counted_by_the_loop_that_loads_them():
    work, other = loop(160), loop(5)
    work["opcodes"] = {"LDG.E.128": 1, "STG.E.128": 1}
    kernel = {"name": "_layer_norm_fwd_kernel", "constexprs": {"ROWS": "16"}, "loops": [other, work]}
    [row] = rows_of(compiled("layer_norm C96 bf16 forward", kernel))
    assert row["instructions"] == 10
    assert row["memory_floor"] == 2 * 96 * 2 / 18.5
    assert row["kernels"][0]["unit_loops"] == 1


def test_a_loop_of_few_ffma_is_no_product():
    loops = [loop(ffma=255), loop(ffma=256)]
    [row] = rows_of(
        compiled("7x7 d32 fp32 forward", {"name": "_window_attention_fwd_kernel", "constexprs": {}, "loops": loops})
    )
    assert row["kernels"][0]["unit_loops"] == 1
    assert row["kernels"][0]["inner"]["multiply_adds"] == 256 * 32 * 4


def test_layouts_are_read_from_the_compilers_own_language():
    ttgir = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 4], instrShape = [16, 8]}>
      %p = "tt.reduce"(%scores) <{axis = 1 : i32}> ({
        tt.reduce.return %m : f32
      }) : (tensor<64x128xf32, #mma>) -> tensor<64xf32, #ttg.slice<{dim = 1, parent = #mma}>>
      %q = "tt.reduce"(%rows) <{axis = 0 : i32}> ({
      }) : (tensor<64x32xf32, #blocked>) -> tensor<32xf32, #ttg.slice<{dim = 0, parent = #blocked}>>
"""
    reductions = [{"tile": [64, 128], "warps": [1, 4]}]
    assert aot.layouts(ttgir) == {"overwritten": [], "mma_warps": [[1, 4]], "row_reductions": reductions}


def test_a_tile_that_a_running_wgmma_and_a_load_read_is_seen():
    ttgir = """
      %x_7 = ttg.memdesc_index %x[%i] : !ttg.memdesc<2x128x64xbf16, #shared> -> !ttg.memdesc<128x64xbf16, #shared>
      %x_8 = ttg.local_load %x_7 token %t : !ttg.memdesc<128x64xbf16, #shared> -> tensor<128x64xbf16, #blocked>
      %n_2 = ttng.warp_group_dot %x_7, %g_5, %n_1 {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared> * !ttg...
      %n_3:3 = ttng.warp_group_dot_wait %n_2, %x_7, %g_5 {pendings = 1 : i32} : tensor<128x128xf32, #mma>, !ttg...
"""
    assert aot.layouts(ttgir)["overwritten"] == ["%x_7"]
    assert aot.layouts(ttgir.replace("pendings = 1", "pendings = 0"))["overwritten"] == []
    assert aot.layouts(ttgir.replace("local_load %x_7", "local_load %y"))["overwritten"] == []


def test_nothing_is_compiled_under_the_interpreter(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_case_is_refused_with_the_nearest_name(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert aot.main(["--cases", "7x7 d32 bf16 forwards", "--out", str(tmp_path / "x.json")]) == 2
    assert "did you mean '7x7 d32 bf16 forward'?" in capsys.readouterr().err


def test_wrong_usage_is_told_before_anything_is_compiled(capsys, tmp_path):
    assert budget.main(["--case", "9x9"]) == 2
    assert "no case's name contains '9x9'" in capsys.readouterr().err
    assert budget.main(["--require-both", "--triton-36", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "is not installed in" in shown.out and "(make budget)" in shown.out
    assert "--require-both needs it" in shown.err


def test_what_a_failed_compilation_printed_is_told():
    nowhere = replace(next(case for case in CASES if case.name == "7x7 d32 bf16 forward"), window=9)
    with pytest.raises(budget.ChildFailed, match=r"exit code 2:\n(.*\n)*unknown case '9x9 d32 bf16 forward'"):
        budget.compile_cases([nowhere], None)


def test_a_measured_time_is_found_by_everything_that_decides_it(tmp_path):
    sizes = {"batch": 128, "height": 56, "width": 56, "heads": 3, "head_dim": 32, "window": 7, "shift": 3}
    result = {
        "op": "window_attention",
        "competitor": "ours (triton)",
        "arch": 90,
        "dtype": "bf16",
        "mode": "forward",
        "sizes": sizes,
    }
    others = [{**result, "competitor": "eager", "measured_clocks": 1.0}, {**result, "measured_clocks": None}]
    rows = {"rows": [*others, {**result, "measured_clocks": 812.0}]}
    (tmp_path / "gpu_h200.json").write_text(json.dumps(rows), encoding="utf-8")
    results = budget.measured_rows(tmp_path)
    [row] = rows_of(compiled("7x7 d32 bf16 forward shifted"))
    assert budget.measured(row, results) == 812.0
    other_sizes = [{"sizes": {**row["sizes"], "shift": 0}}, {"sizes": {**row["sizes"], "height": 28}}, {"sizes": None}]
    for change in (
        {"arch": 80},
        {"measured_as": "layer_norm"},
        {"dtype": "fp16"},
        {"direction": "backward"},
        *other_sizes,
    ):
        assert budget.measured({**row, **change}, results) is None


def test_cases_find_the_rows_of_the_calls_that_they_are_about():
    asked, measured = set(), set()
    for op in stages.ops():
        for (name, shape), mode in itertools.product(op.SHAPES.items(), ("forward", "backward")):
            sizes = json.loads(json.dumps(asdict(shape)))
            result = {"op": op.OP, "arch": 90, "dtype": "bf16", "mode": mode, "sizes": sizes, "measured_clocks": 1.0}
            named = set(op.budget_cases(shape, "bf16", mode))
            asked |= named
            for case in CASES:
                row = {"arch": 90, **{x: getattr(case, x) for x in ("measured_as", "dtype", "direction", "sizes")}}
                if budget.measured(row, [result]) is not None:
                    assert case.name in named, f"{op.OP} {name} is not a call that {case.name} is about"
                    measured.add(case.name)
    assert {case.name for case in CASES} & asked - measured == set()
