"""What part of the mma.sync ceiling a compiled kernel can reach, from the instructions of its main loop alone.

One sub-partition of an SM is followed cycle by cycle while its matrix warps go round the loop. ASSUMPTIONS says what is
taken for granted; benchmarks/NOTES.md holds the model against measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flash_attn_sm120.hot_path import HotPath, hot_path
from flash_attn_sm120.occupancy import SUB_PARTITIONS
from flash_attn_sm120.sass import SCOREBOARDS, Instruction, disassemble

MMA_CYCLES = (16, 32)  # that an HMMA m16n8k16 holds a sub-partition's matrix unit: GB10 and RTX PRO 6000, RTX 5090
EXP2_CYCLES = 8  # that a MUFU holds its unit: 32 lanes, 16 a clock and SM
SHARED_BYTES_A_CYCLE = 128 // SUB_PARTITIONS
LATENCY = 30  # cycles after which a scoreboard is clear again
TURNS = 12  # of the loop, that each warp is followed for after one that isn't counted
BINDS = 0.9

ASSUMPTIONS = f"""\
% at 16, % at 32: predicted percent of the mma.sync ceiling where an HMMA m16n8k16 holds a sub-partition's matrix unit
16 cycles (GB10, RTX PRO 6000) or 32 (RTX 5090). The matrix warps of a sub-partition start together and are followed for
{TURNS} KV blocks. One instruction issues a cycle, of the warp that waited longest; stall counts are the compiled ones;
a scoreboard clears after {LATENCY} cycles; a MUFU holds its unit {EXP2_CYCLES}; shared memory gives \
{SHARED_BYTES_A_CYCLE} bytes a cycle; K and V are there in time.
Left out: prologue, epilogue, KV blocks that need a mask, and those that rescale O (rescale: the issue slots it adds).
binds: what limits at 16 / at 32; latency: no unit is busy {BINDS:.0%} of the time."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """hmma, other: issue slots of a warp and KV block that needs no mask and doesn't rescale O; rescale: those that
    rescaling adds. percent and binds by MMA_CYCLES; binds is the busiest unit, or "latency" if even that one rests for
    more than 1 - BINDS of the time."""

    hmma: int
    other: int
    rescale: int
    percent: dict[int, float]
    binds: dict[int, str]


def predict(cubin: bytes, warps: int) -> Prediction:
    """warps: matrix warps of a sub-partition. Raises sass.NotAvailable, say without a disassembler."""
    return predict_path(hot_path(disassemble(cubin)), warps)


def predict_path(path: HotPath, warps: int) -> Prediction:
    hmma = sum(instruction.name == "HMMA" for instruction in path.instructions)
    percent, binds = {}, {}
    for mma_cycles in MMA_CYCLES:
        shares = busy_shares(path.instructions, warps, mma_cycles)
        most = max(shares, key=shares.__getitem__)
        percent[mma_cycles] = 100 * shares["mma"]
        binds[mma_cycles] = most if shares[most] >= BINDS else "latency"
    return Prediction(hmma, len(path.instructions) - hmma, path.rescale_slots, percent, binds)


@dataclass(slots=True)
class _Warp:
    """ready: when the stall of its last instruction is over."""

    ready: float = 0.0
    clear: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    last_issue: float = -1.0
    place: int = 0
    turns: int = 0


def busy_shares(path: Sequence[Instruction], warps: int, mma_cycles: float) -> dict[str, float]:
    """For each unit of a sub-partition, the share of the time that it works while `warps` warps go round the path."""
    work = [_work(instruction, mma_cycles) for instruction in path]
    free = {"issue": 0.0, "mma": 0.0, "exp2": 0.0, "shared memory": 0.0}  # from when
    busy = dict.fromkeys(free, 0.0)
    since, before = 0.0, dict(busy)
    state = [_Warp() for _ in range(warps)]

    def earliest(warp: _Warp) -> float:
        unit, _ = work[warp.place]
        queued = unit == "shared memory"  # what isn't queued waits with its warp until the unit is free
        waits = (warp.clear[board] for board in path[warp.place].waits)
        return max(warp.ready, free["issue"], 0.0 if queued else free[unit], *waits)

    while state[0].turns <= TURNS:
        cycle, _, number = min((earliest(warp), warp.last_issue, number) for number, warp in enumerate(state))
        warp, instruction = state[number], path[state[number].place]
        unit, cycles = work[warp.place]
        begin = max(cycle, free[unit])
        free[unit] = begin + cycles
        busy[unit] += cycles
        if unit != "issue":
            free["issue"] = cycle + 1
            busy["issue"] += 1
        for board in (instruction.result, instruction.operands):
            if board is not None:
                warp.clear[board] = max(warp.clear[board], begin + LATENCY)
        warp.ready, warp.last_issue = cycle + max(instruction.stall, 1), cycle
        warp.place += 1
        if warp.place == len(path):
            warp.place, warp.turns = 0, warp.turns + 1
            if number == 0 and warp.turns == 1:
                since, before = cycle, dict(busy)
    return {unit: min((busy[unit] - before[unit]) / (cycle - since), 1.0) for unit in busy}


def _work(instruction: Instruction, mma_cycles: float) -> tuple[str, float]:
    """(unit, cycles that the instruction holds it)."""
    if instruction.name == "HMMA":
        return "mma", mma_cycles
    if instruction.name == "MUFU":
        return "exp2", EXP2_CYCLES
    if instruction.name in ("LDSM", "LDS", "STS", "LDGSTS"):
        last = instruction.opcode.rpartition(".")[2]
        lane_bytes = {"4": 16, "128": 16, "2": 8, "64": 8}.get(last, 4)  # ldmatrix counts matrices, the others bits
        return "shared memory", 32 * lane_bytes / SHARED_BYTES_A_CYCLE
    return "issue", 1
