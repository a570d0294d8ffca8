"""Machine code written by hand, whose loops and clocks can be counted on the fingers."""

import pytest

from bench.budget import sass

HEAD = '\n\tcode for sm_80\n\t\tFunction : _kernel\n\t.headerflags\t@"EF_CUDA_SM80"\n'


def text(*lines: str) -> str:
    """Lay instructions out as cuobjdump does, 16 bytes apart, with their encodings."""
    return HEAD + "".join(
        f"        /*{16 * n:04x}*/    {line} ;    /* 0x0123 */\n        /* 0x0456 */\n" for n, line in enumerate(lines)
    )


def code(*lines: str) -> list[sass.Instruction]:
    return sass.parse(text(*lines))


def names(instructions) -> list[str]:
    return [instruction.name for instruction in instructions]


def test_a_line_is_address_guard_name_and_operands():
    first, second = code("@!P1 LDG.E.128 R4, [R2.64+0x10]", "EXIT")
    assert (first.address, first.name, first.opcode, first.guarded) == (0, "LDG.E.128", "LDG", True)
    assert first.operands == "R4, [R2.64+0x10]"
    assert (second.address, second.guarded, second.operands) == (16, False, "")


def test_every_unknown_instruction_is_named():
    with pytest.raises(sass.UnknownOpcodes, match=r"no unit is known for FROBNICATE\.X, TWIDDLE: add each"):
        code("TWIDDLE R1", "FADD R1, R2, R3", "FROBNICATE.X R1", "EXIT")


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "got no instruction"), (text("EXIT") + text("EXIT").replace("_kernel", "_other"), "got 2: _kernel, _other")],
)
def test_a_text_without_one_function_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sass.parse(given)


def test_registers_and_stack_are_read():
    assert sass.resources("ptxas: Function _kernel:\n  REG:132 STACK:40 SHARED:0 LOCAL:0") == (132, 40)
    with pytest.raises(ValueError, match="must hold REG and STACK"):
        sass.resources("nothing")


def test_a_branch_backward_closes_a_loop_and_the_trap_at_the_end_does_not():
    # 0x10 .. 0x30 is the loop; 0x50 branches to itself and is never reached.
    [loop] = sass.loops(code("MOV R1, R2", "FADD R1, R1, R2", "FMUL R1, R1, R3", "@P0 BRA 0x10", "EXIT", "BRA 0x50"))
    assert loop.head == 0x10
    assert names(loop.own) == ["FADD", "FMUL", "BRA"]
    assert loop.children == ()


def test_loops_nest_and_an_instruction_belongs_to_the_innermost():
    [outer] = sass.loops(
        code(
            "S2R R0, SR_TID.X",
            "IADD3 R1, R1, R2, RZ",  # 0x10, the outer head
            "FFMA R3, R3, R4, R5",  # 0x20, the inner head
            "@P0 BRA 0x20",
            "STG.E [R6.64], R3",
            "@P1 BRA 0x10",
            "EXIT",
        )
    )
    [inner] = outer.children
    assert names(outer.own) == ["IADD3", "STG.E", "BRA"]
    assert names(inner.own) == ["FFMA", "BRA"]


def test_two_branches_to_one_head_are_one_loop():
    way_out = ("FFMA R1, R1, R2, R3", "@P1 BRA 0x0", "EXIT")  # 0x40
    [loop] = sass.loops(code("FADD R1, R1, R2", "@P0 BRA 0x40", "FMUL R1, R1, R2", "BRA 0x0", *way_out))
    assert names(loop.own) == ["FADD", "BRA", "FMUL", "BRA", "FFMA", "BRA"]


def test_a_branch_may_carry_its_condition_as_an_operand():
    # Were it unconditional, what follows would never run, and there would be no loop.
    [loop] = sass.loops(code("FADD R1, R1, R2", "BRA.DIV UR4, 0x40", "FMUL R1, R1, R2", "@P0 BRA 0x0", "EXIT"))
    assert names(loop.own) == ["FADD", "BRA.DIV", "FMUL", "BRA"]


def test_loops_one_after_another_keep_their_order():
    loops = sass.loops(code("FADD R1, R1, R2", "@P0 BRA 0x0", "FMUL R1, R1, R2", "@P1 BRA 0x20", "EXIT"))
    assert [names(loop.own) for loop in loops] == [["FADD", "BRA"], ["FMUL", "BRA"]]


def test_both_sides_of_a_branch_inside_a_loop_count():
    [loop] = sass.loops(
        code("FADD R1, R1, R2", "@P0 BRA 0x30", "FMUL R1, R1, R2", "FFMA R1, R1, R2, R3", "@P1 BRA 0x0")
    )
    assert names(loop.own) == ["FADD", "BRA", "FMUL", "FFMA", "BRA"]


def test_a_jump_back_from_code_that_lies_apart_is_no_loop():
    # 0x40 is the rare case of 0x10, placed behind the exit; it goes back to where both ways meet.
    assert (
        sass.loops(code("MOV R1, R2", "@P0 BRA 0x40", "FADD R1, R1, R2", "EXIT", "FMUL R1, R1, R2", "BRA 0x20")) == []
    )


def test_a_call_that_never_returns_leaves_the_loop_as_a_branch_would():
    # What ptxas makes of `while` on sm_80: the call goes to the exit, and the branch behind it is unconditional.
    lines = code("FADD R1, R1, R2", "@!P0 CALL.REL.NOINC 0x30", "BRA 0x0", "FMUL R1, R1, R2", "EXIT")
    [loop] = sass.loops(lines)
    assert names(loop.own) == ["FADD", "CALL.REL.NOINC", "BRA"]
    assert sass.returning_calls(lines) == set()


def test_a_call_of_a_subroutine_is_told_and_its_instructions_are_in_no_loop():
    lines = code(
        "FADD R1, R1, R2", "CALL.REL.NOINC 0x40", "@P0 BRA 0x0", "EXIT", "MUFU.RCP R1, R1", "RET.REL.NODEC R2 0x0"
    )
    [loop] = sass.loops(lines)
    assert names(loop.own) == ["FADD", "CALL.REL.NOINC", "BRA"]
    assert sass.returning_calls(lines) == {0x10}


def test_what_no_loop_holds_and_can_be_reached_is_outside():
    lines = code("MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "FMUL R1, R1, R3", "EXIT", "BRA 0x50")
    assert [line.opcode for line in sass.outside_loops(lines)] == ["MOV", "FMUL", "EXIT"]


def test_a_branch_without_a_target_is_refused():
    with pytest.raises(ValueError, match="must name its target, got BRA R4"):
        sass.loops(code("FADD R1, R1, R2", "BRA R4", "EXIT"))


@pytest.mark.parametrize(
    ("line", "pipe", "on_80", "on_90"),
    [
        ("FFMA R1, R2, R3, R4", "fma", 2, 1),
        ("HFMA2.MMA R1, R2, R3, R4", "fma", 2, 1),
        ("IMAD.WIDE R1, R2, R3, R4", "imad", 2, 2),
        ("IMAD.MOV.U32 R1, RZ, RZ, R4", "fma", 2, 1),
        ("FMNMX R1, R2, R3, !PT", "alu", 2, 2),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "alu", 2, 2),
        ("MUFU.EX2 R1, R2", "mufu", 8, 8),
        ("I2F.RP R1, R2", "mufu", 8, 8),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "lsu", 4, 4),
        ("LDS R1, [R2]", "lsu", 4, 4),
        ("LDS.64 R2, [R4]", "shared", 8, 8),
        ("STS.128 [R4], R8", "shared", 16, 16),
        ("LDG.E.128 R4, [R2.64]", "lsu", 16, 16),
        ("LDG.E.128 R4, [R2.64]", "shared", 0, 0),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", "shared", 16, 16),
        ("LDSM.16.M88.4 R4, [R2]", "shared", 16, 16),
        ("LDSM.16.MT88.2 R4, [R2]", "shared", 8, 8),
        ("STSM.16.M88 [R2], R4", "shared", 4, 4),
        ("UIADD3 UR4, UR5, UR6, URZ", "uniform", 2, 2),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor", 8, 4),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "tensor", 8, 4),
        ("BAR.SYNC 0x0", "issue", 1, 1),
    ],
)
def test_four_warps_take_the_clocks_that_the_rates_say(line, pipe, on_80, on_90):
    for arch, expected in ((80, on_80), (90, on_90)):
        found = sass.clocks(code(line), arch, 4)
        assert found[pipe] == expected
        assert found["issue"] == 1


def test_hgmma_is_the_work_of_four_warps_and_reads_shared_memory_by_itself():
    both, right = code(
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24",
    )
    assert sass.clocks([both], 90, 4)["tensor"] == 64 * 64 * 16 / 2048
    assert sass.clocks([both], 90, 8)["tensor"] == 2 * 64 * 64 * 16 / 2048
    assert sass.clocks([both], 90, 4)["shared"] == (64 + 64) * 32 / 128
    assert sass.clocks([right], 90, 4)["shared"] == 32 * 32 / 128


def test_clocks_add_up_and_grow_with_the_warps():
    lines = code("FFMA R1, R2, R3, R4", "MUFU.EX2 R1, R2", "MUFU.EX2 R3, R4")
    four, eight = sass.clocks(lines, 80, 4), sass.clocks(lines, 80, 8)
    assert (four["issue"], four["fma"], four["mufu"]) == (3, 2, 16)
    assert eight == {pipe: 2 * clocks for pipe, clocks in four.items()}


@pytest.mark.parametrize("line", ["HMMA.F32 R4, R8, R12, R4", "HGMMA.F32 R4, gdesc[UR8], R4"])
def test_a_product_without_a_shape_is_refused(line):
    with pytest.raises(ValueError, match="must name its shape"):
        sass.clocks(code(line), 90, 4)
