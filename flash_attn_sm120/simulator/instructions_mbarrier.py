"""mbarrier instructions: few lanes execute them, so they go warp by warp."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .instructions_memory import address_reader
from .parser import Instruction, Mem
from .table import control, operation, unsupported

_QUALIFIERS = ("shared", "release", "acquire", "relaxed", "cta", "cluster", "b64", "parity", "noComplete", "noinc")


def _qualified(ins: Instruction, known: tuple[str, ...]) -> None:
    for part in ins.parts:
        if part.split("::")[0] not in _QUALIFIERS and part not in known:
            raise unsupported(ins)


def lanes_by_warp(m, S, mask, *operands):
    """For each warp with active lanes: its number and one tuple of operand values for each active lane."""
    warps = m.warp_ids[S]
    values = [np.broadcast_to(read(S), (len(warps), 32)) for read in operands]
    for row, warp in enumerate(warps):
        lanes = range(32) if mask is None else np.flatnonzero(mask[row])
        if len(lanes):
            yield int(warp), [tuple(int(v[row, lane]) for v in values) for lane in lanes]


@operation("mbarrier")
def _mbarrier(m, ins: Instruction):
    action = ins.parts[1]
    at = next(i for i, a in enumerate(ins.args) if isinstance(a, Mem))
    address = address_reader(m, ins.args[at], "u32")
    _qualified(ins, ("mbarrier", action, "expect_tx"))
    extra = m.read(ins.args[at + 1], "u32") if len(ins.args) > at + 1 else None
    zero = lambda S: np.uint32(0)  # noqa: E731
    operands = (address, extra or zero)
    barriers = m.barriers

    def init(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, *operands):
            for where, count in lanes:
                barriers.init(ins, warp, where, count)

    def arrive(S, mask):
        expects = "expect_tx" in ins.parts
        for warp, lanes in lanes_by_warp(m, S, mask, *operands):
            for (where, number), times in Counter(lanes).items():
                if expects:
                    barriers.arrive_mbarrier(ins, warp, where, times, number * times)
                else:
                    barriers.arrive_mbarrier(ins, warp, where, times * (number if extra else 1))

    def expect(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, *operands):
            for where, number in lanes:
                barriers.expect(ins, warp, where, number)

    def inval(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, *operands):
            for where, _ in lanes:
                barriers.mbarriers.pop((warp // m.warps_per_cta, where), None)

    steps = {"init": init, "arrive": arrive, "expect_tx": expect, "inval": inval}
    if action == "arrive" and at == 1 and getattr(ins.args[0], "name", "") != "_":
        # The returned state is opaque; a kernel that reads it waits by state, which raises when bound.
        store = m.write(ins.args[0], "b64")

        def arrive_with_state(S, mask):
            arrive(S, mask)
            store(S, mask, np.uint64(0))

        return arrive_with_state
    return steps[action]


def bind_copies_arrive(m, ins: Instruction):
    """cp.async.mbarrier.arrive{.noinc} [mbarrier]; without noinc the arrival is one that nobody expects."""
    _qualified(ins, ("cp", "async", "mbarrier", "arrive"))
    address, counted = address_reader(m, ins.args[0], "u32"), "noinc" in ins.parts

    def step(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, address):
            for (where,), times in Counter(lanes).items():
                m.barriers.arrive_copies(ins, warp, where, times if counted else 0)

    return step


@control("mbarrier wait")
def _wait(m, ins: Instruction, after: int):
    """try_wait and test_wait by parity: a warp whose phase isn't over sleeps until it is, or nothing else can run."""
    if "parity" not in ins.parts or ins.guard is not None:
        raise unsupported(ins)
    _qualified(ins, ("mbarrier", "try_wait", "test_wait"))
    done = m.write(ins.args[0], "pred")
    address, parity = address_reader(m, ins.args[1], "u32"), m.read(ins.args[2], "u32")

    def step(S, mask):
        # Warps that must not wait go on together.
        passed, failed = [], []
        for warp, lanes in lanes_by_warp(m, S, mask, address, parity):
            if len(set(lanes)) > 1:
                raise unsupported(ins)
            result = m.barriers.wait_mbarrier(ins, warp, *lanes[0])
            if result is not None:
                (passed if result else failed).append(warp)
        rows = {int(w): i for i, w in enumerate(m.warp_ids[S])}
        for warps, value in ((passed, True), (failed, False)):
            if warps:
                chosen = np.array(warps)
                part = None if mask is None else mask[[rows[w] for w in warps]]
                done(chosen, part, np.full((len(warps), 32), value))
                m.advance(chosen, part, after)

    return step
