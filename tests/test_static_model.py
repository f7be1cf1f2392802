"""The static model on code written by hand, whose cycles can be counted on paper."""

import pytest

from flash_attn_sm120.hot_path import hot_path
from flash_attn_sm120.sass import NotAvailable, parse
from flash_attn_sm120.static_model import EXP2_CYCLES, LATENCY, busy_shares, predict_path


def sass(*lines):
    """Text as nvdisasm prints it. A line is a label, an instruction, or (instruction, stall, result, waits)."""
    text, address = ["\t.section\t.text.kernel", ".text.kernel:"], 0
    for line in lines:
        if isinstance(line, str) and line.startswith("."):
            text.append(f"{line}:")
            continue
        instruction, stall, result, waits = (line, 1, None, ()) if isinstance(line, str) else line
        word = stall << 41 | (7 if result is None else result) << 46 | 7 << 49 | sum(1 << 52 + board for board in waits)
        text.append(f"        /*{address:04x}*/                   {instruction} ;   /* 0x{address:016x} */")
        text.append(f"{'':80} /* 0x{word:016x} */")
        address += 16
    return "\n".join(text)


HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
EX2 = "MUFU.EX2 R20, R20"
LDSM = "LDSM.16.M88.4 R8, [R1+UR7]"
FADD = "FADD R21, R20, R20"
END = ("@P0 BRA `(.L_loop)", "EXIT")


def turn(*lines):
    return hot_path(parse(sass(".L_loop", *lines, *END)))


def test_fields_of_an_instruction():
    code = parse(
        sass(
            ("@!P1 LDSM.16.MT88.4 R160, [R213+0xb800]", 9, 5, (0, 3)),
            "BRA.U !UP0, `(.L_x_1)",
            "EXIT",
            ".L_x_1",
            "BRA `(.L_x_1)",
        )
    )
    load = code[0]
    assert (load.opcode, load.name, load.stall, load.result, load.operands) == ("LDSM.16.MT88.4", "LDSM", 9, 5, None)
    assert load.waits == (0, 3)
    assert [instruction.leads_to for instruction in code] == [(1,), (3, 2), (), (3,)]


LOOK = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5+0xc038], R204"
SELECT = "FSEL R20, R20, -INF , P1"
SCALE = "FMUL R4, R4, R3"


def test_the_usual_turn_has_no_mask_no_second_look_and_no_rescale():
    code = sass(
        *("MOV R1, R2", ".L_loop", "BRA.U !UP0, `(.L_unmasked)"),
        *(LOOK, HMMA, *[SELECT] * 9, EX2, "BRA `(.L_end)"),
        *(".L_unmasked", LOOK, "@!P0 BRA `(.L_wait)", ".L_there", HMMA),
        *("VOTE.ANY P0, P0", "@!P0 BRA `(.L_rest)", *[SCALE] * 3, ".L_rest", EX2),
        *(".L_end", *END),
        *(".L_wait", LOOK, "@!P0 BRA `(.L_wait)", "BRA `(.L_there)"),
    )
    path = hot_path(parse(code))
    names = [instruction.name for instruction in path.instructions]
    assert names == ["BRA", "SYNCS", "BRA", "HMMA", "VOTE", "BRA", "MUFU", "BRA"]
    assert path.rescale_slots == 3


def test_the_usual_turn_multiplies_all_and_loads_the_next_block():
    path = turn(
        *("@P1 BRA `(.L_some)", HMMA, ".L_some", HMMA, "@P2 BRA `(.L_last)"),
        *("LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR8][R4.64]", "IADD R3, R3, 0x1", ".L_last"),
    )
    names = [instruction.name for instruction in path.instructions]
    assert names == ["BRA", "HMMA", "HMMA", "BRA", "LDGSTS", "IADD", "BRA"]
    assert path.rescale_slots == 0


def test_of_two_loops_that_multiply_the_tight_one_counts():
    masked = (".L_masked", HMMA, *[SELECT] * 5, "@P0 BRA `(.L_masked)")
    tight = (".L_tight", HMMA, FADD, "@P0 BRA `(.L_tight)")
    tiles = (".L_tile", *masked, *tight, *masked_again(masked), "@P3 BRA `(.L_tile)", "EXIT")
    names = [instruction.name for instruction in hot_path(parse(sass(*tiles))).instructions]
    assert names == ["HMMA", "FADD", "BRA"]


def masked_again(loop):
    return (line.replace(".L_masked", ".L_again") for line in loop)


def test_code_without_products():
    with pytest.raises(NotAvailable, match="no loop with HMMA"):
        turn(FADD)
    with pytest.raises(NotAvailable, match="no loop with HMMA"):
        hot_path(parse(sass(HMMA, "EXIT")))


# Issue slots of a turn count the branch back. Cycles of a steady turn of all warps together:
SPACED = ((HMMA, 11, None, ()),) * 4
CHAIN = (HMMA, (EX2, 1, 0, ()), (FADD, 1, None, (0,)))
CASES = [
    # the unit is never free for long: 4 HMMAs
    ("spaced, unit slower", SPACED, 1, 16, "mma", 4 * 16, 4 * 16),
    # the stall counts alone; one cycle for the branch
    ("spaced, unit faster", SPACED, 1, 8, "mma", 4 * 8, 4 * 11 + 1),
    ("spaced, two warps fill it", SPACED, 2, 8, "mma", 8 * 8, 8 * 8),
    # HMMA, MUFU, the wait for its result, FADD, branch
    ("one warp waits", CHAIN, 1, 16, "mma", 16, 1 + LATENCY + 2),
    ("one warp waits, exp2", CHAIN, 1, 16, "exp2", EXP2_CYCLES, 1 + LATENCY + 2),
    ("one warp waits, slots", CHAIN, 1, 16, "issue", 4, 1 + LATENCY + 2),
    ("the second works meanwhile", CHAIN, 2, 16, "mma", 32, 1 + LATENCY + 2),
    ("exp2 binds", (HMMA, *[EX2] * 4), 2, 8, "exp2", 64, 64),
    ("exp2 binds, products", (HMMA, *[EX2] * 4), 2, 8, "mma", 16, 64),
    ("issue binds", (HMMA, *[FADD] * 18), 2, 8, "issue", 40, 40),
    ("issue binds, products", (HMMA, *[FADD] * 18), 2, 8, "mma", 16, 40),
    ("shared memory", ((LDSM, 1, 0, ()), (HMMA, 1, None, (0,))), 1, 16, "shared memory", 16, LATENCY + 2),
    (
        "shared memory queues",
        ((LDSM, 1, 0, ()), (LDSM, 1, 1, ()), (HMMA, 1, None, (1,))),
        1,
        8,
        "mma",
        8,
        16 + LATENCY + 2,
    ),
    (
        "less is read",
        ((LDSM.replace(".4", ".2"), 1, 0, ()), (HMMA, 1, None, (0,))),
        1,
        16,
        "shared memory",
        8,
        LATENCY + 2,
    ),
]


@pytest.mark.parametrize(
    "lines, warps, mma_cycles, unit, busy, cycles", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_shares_of_time(lines, warps, mma_cycles, unit, busy, cycles):
    found = busy_shares(turn(*lines).instructions, warps, mma_cycles)
    assert found[unit] == pytest.approx(busy / cycles, abs=0.02)


def test_prediction():
    prediction = predict_path(turn(*CHAIN), 1)
    assert (prediction.hmma, prediction.other, prediction.rescale) == (1, 3, 0)
    assert prediction.percent[16] == pytest.approx(100 * 16 / 33, abs=2) and prediction.binds[16] == "latency"
    assert prediction.percent[32] == pytest.approx(100 * 32 / 33, abs=2) and prediction.binds[32] == "mma"
