"""Barriers of a CTA, cp.async groups and mbarriers: who waits, who is released, and what becomes ordered by it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .constants import EXIT
from .parser import Instruction
from .report import UnsupportedInstruction
from .shared_memory import MBARRIER_SLOTS

NAMED_BARRIERS = 16
GROUP_RING = 64


@dataclass
class MBarrier:
    """An mbarrier object: arrivals still pending and expected in a phase, bytes in flight, phases completed."""

    expected: int
    slot: int
    init_agent: int
    init_clock: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    arrived_clock: np.ndarray = field(default=None, repr=False)
    phase_clock: np.ndarray = field(default=None, repr=False)


class Barriers:
    """The waiting state of all warps of a batch."""

    def __init__(self, machine):
        self.m = machine

    def start(self) -> None:
        m = self.m
        self.count = np.zeros((m.ctas, NAMED_BARRIERS), np.int64)
        self.need = np.zeros((m.ctas, NAMED_BARRIERS), np.int64)
        self.joined = np.zeros((m.ctas, NAMED_BARRIERS, m.shared.columns), np.int32)
        self.waits_at = np.full(m.warps, -1)
        self.waiting_for: dict[int, Instruction] = {}
        # Copies are numbered; the ring keeps the last number of each of a warp's last groups.
        self.open = np.ones(m.warps, np.int32)
        self.groups = np.zeros(m.warps, np.int64)
        self.ring = np.zeros((m.warps, GROUP_RING), np.int32)
        self.bulk_open = np.ones(m.warps, np.int32)
        self.mbarriers: dict[tuple[int, int], MBarrier] = {}
        self.mbarrier_waits: dict[int, tuple[int, int]] = {}
        self.timed_out = np.zeros(m.warps, bool)
        self.progress = 0
        self.stalled_at = -1

    # Named barriers

    def arrive(self, ins: Instruction, warps, identity, threads, waits: bool) -> None:
        """Warps reach bar.sync (waits) or bar.arrive; `threads` None means every thread of the CTA."""
        m, per_cta = self.m, self.m.warps_per_cta
        self.progress += 1
        if waits and threads is None and (identity == identity[0]).all():
            present = np.bincount(m.cta_of[warps], minlength=m.ctas)
            full = (present == per_cta) & (self.count[:, identity[0]] == 0)
            if full.any():
                clock = m.shared.clock.reshape(m.ctas, per_cta, -1)
                chosen = slice(None) if full.all() else full
                clock[chosen] = clock[chosen].max(axis=1, keepdims=True)
                m.shared.tick(warps[full[m.cta_of[warps]]])
                rest = ~full[m.cta_of[warps]]
                warps, identity = warps[rest], identity[rest]
        for i, warp in enumerate(warps):
            self._arrive_one(ins, int(warp), int(identity[i]), None if threads is None else int(threads[i]), waits)

    def _arrive_one(self, ins: Instruction, warp: int, number: int, threads: int | None, waits: bool) -> None:
        m = self.m
        cta = warp // m.warps_per_cta
        if threads is not None and threads % 32:
            m.fail("divergent barrier", ins, f"a barrier of {threads} threads isn't a whole number of warps", warp)
        if self.count[cta, number] and self.need[cta, number] != (threads or 0):
            m.fail("divergent barrier", ins, f"warps give barrier {number} different thread counts", warp)
        self.need[cta, number] = threads or 0
        self.count[cta, number] += 32
        np.maximum(self.joined[cta, number], m.shared.clock[warp], out=self.joined[cta, number])
        m.shared.tick(np.array([warp]))
        if waits:
            m.blocked[warp] = True
            self.waits_at[warp] = number
            self.waiting_for[warp] = ins
        self._complete(cta, number)

    def _complete(self, cta: int, number: int) -> None:
        m = self.m
        first = cta * m.warps_per_cta
        mine = slice(first, first + m.warps_per_cta)
        need = self.need[cta, number] or 32 * int((m.warp_pc[mine] < EXIT).sum())
        if self.count[cta, number] < need or not self.count[cta, number]:
            return
        waiting = first + np.flatnonzero(self.waits_at[mine] == number)
        m.shared.clock[waiting] = np.maximum(m.shared.clock[waiting], self.joined[cta, number])
        m.blocked[waiting] = False
        self.waits_at[waiting] = -1
        self.count[cta, number] = 0
        self.joined[cta, number] = 0

    def exited(self, warps) -> None:
        """Warps may have ended; a barrier over the whole CTA no longer waits for them."""
        self.progress += 1
        if (self.waits_at >= 0).any():
            for cta in np.unique(self.m.cta_of[warps]):
                for number in np.flatnonzero(self.count[cta]):
                    self._complete(int(cta), int(number))

    # cp.async groups

    def copy_number(self, warps) -> np.ndarray:
        """The number of a warp's next cp.async; those of a group share one, or a few."""
        return self.open[warps]

    def commit(self, warps) -> None:
        self.ring[warps, self.groups[warps] % GROUP_RING] = self.open[warps]
        self.groups[warps] += 1
        self.open[warps] += 1

    def wait_group(self, warps, allowed: int) -> None:
        """All but the `allowed` last groups are complete; -1 also completes copies that no commit covers."""
        if allowed < 0:
            done = self.open[warps].copy()
            self.open[warps] += 1
        else:
            last = self.groups[warps] - 1 - allowed
            done = np.where(last >= 0, self.ring[warps, last % GROUP_RING], 0)
        agents = self.m.shared.copy_agent(warps)
        clock = self.m.shared.clock
        clock[warps, agents] = np.maximum(clock[warps, agents], done)

    def arrive_copies(self, ins: Instruction, warp: int, address: int, arrivals: int) -> None:
        """cp.async.mbarrier.arrive: the mbarrier orders the copies so far of the warp; `arrivals` of it are counted."""
        barrier = self.get(ins, warp, address)
        agent = int(self.m.shared.copy_agent(np.array([warp]))[0])
        barrier.arrived_clock[agent] = max(barrier.arrived_clock[agent], self.open[warp])
        self.open[warp] += 1
        self._count(ins, warp, address, barrier, arrivals)

    def commit_bulk(self, warps) -> None:
        self.bulk_open[warps] += 1

    def wait_bulk(self, warps, allowed: int) -> None:
        """All but the `allowed` last groups of bulk stores have read their shared memory."""
        agents = self.m.shared.bulk_agent(warps)
        clock = self.m.shared.clock
        clock[warps, agents] = np.maximum(clock[warps, agents], self.bulk_open[warps] - 1 - allowed)

    # mbarriers

    def init(self, ins: Instruction, warp: int, address: int, expected: int) -> None:
        m = self.m
        cta = warp // m.warps_per_cta
        if address % 8:
            m.fail("misaligned access", ins, "an mbarrier needs 8 bytes", warp, address=address, tensor="shared memory")
        slot = sum(1 for key in self.mbarriers if key[0] == cta)
        if slot >= MBARRIER_SLOTS:
            raise UnsupportedInstruction(f"more than {MBARRIER_SLOTS} mbarriers in a CTA")
        agent = int(m.shared.warp_agent(np.array([warp]))[0])
        zeros = np.zeros(m.shared.columns, np.int32)
        self.mbarriers[cta, address] = MBarrier(
            expected,
            slot,
            agent,
            int(m.shared.clock[warp, agent]),
            expected,
            arrived_clock=zeros,
            phase_clock=zeros.copy(),
        )

    def get(self, ins: Instruction, warp: int, address: int) -> MBarrier:
        """The mbarrier that a warp uses; it must be initialised, and the initialisation ordered before."""
        m = self.m
        barrier = self.mbarriers.get((warp // m.warps_per_cta, address))
        if barrier is None:
            m.fail(
                "uninitialised mbarrier", ins, "no mbarrier.init here", warp, address=address, tensor="shared memory"
            )
        if barrier.init_clock > m.shared.clock[warp, barrier.init_agent]:
            m.fail(
                "shared-memory race", ins, "mbarrier used before its initialisation is ordered", warp, address=address
            )
        return barrier

    def arrive_mbarrier(self, ins: Instruction, warp: int, address: int, arrivals: int, expect_bytes: int = 0) -> None:
        """`arrivals` lanes of a warp arrive, releasing what the warp did; `expect_bytes` are awaited too."""
        barrier = self.get(ins, warp, address)
        clock = self.m.shared.clock
        np.maximum(barrier.arrived_clock, clock[warp], out=barrier.arrived_clock)
        self.m.shared.tick(np.array([warp]))
        barrier.bytes += expect_bytes
        self._count(ins, warp, address, barrier, arrivals)

    def _count(self, ins: Instruction, warp: int, address: int, barrier: MBarrier, arrivals: int) -> None:
        barrier.pending -= arrivals
        if barrier.pending < 0:
            self.m.fail(
                "mbarrier overflow", ins, "more arrivals than the mbarrier expects in a phase", warp, address=address
            )
        self._phase(warp // self.m.warps_per_cta, address, barrier)

    def expect(self, ins: Instruction, warp: int, address: int, nbytes: int) -> None:
        self.get(ins, warp, address).bytes += nbytes

    def complete_bytes(self, ins: Instruction, warp: int, address: int, nbytes: int) -> None:
        """A tensor copy has delivered `nbytes` to the mbarrier of the current phase."""
        barrier = self.get(ins, warp, address)
        agent = self.m.shared.mbarrier_agent(barrier.slot)
        barrier.arrived_clock[agent] = barrier.phase + 1
        barrier.bytes -= nbytes
        self._phase(warp // self.m.warps_per_cta, address, barrier)

    def _phase(self, cta: int, address: int, barrier: MBarrier) -> None:
        self.progress += 1
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.pending = barrier.expected
        np.maximum(barrier.phase_clock, barrier.arrived_clock, out=barrier.phase_clock)
        for warp, key in list(self.mbarrier_waits.items()):
            if key == (cta, address):
                del self.mbarrier_waits[warp]
                self.m.blocked[warp] = False

    def wait_mbarrier(self, ins: Instruction, warp: int, address: int, parity: int) -> bool | None:
        """True when the phase of that parity is complete; None blocks the warp; False after a time-out."""
        barrier = self.get(ins, warp, address)
        if barrier.phase & 1 != parity & 1:
            clock = self.m.shared.clock
            np.maximum(clock[warp], barrier.phase_clock, out=clock[warp])
            return True
        if self.timed_out[warp]:
            self.timed_out[warp] = False
            return False
        self.m.blocked[warp] = True
        self.mbarrier_waits[warp] = (warp // self.m.warps_per_cta, address)
        self.waiting_for[warp] = ins
        return None

    def stalled(self) -> None:
        """Nothing can run: let the mbarrier waits time out once; a second time without progress is a deadlock."""
        if self.mbarrier_waits and self.stalled_at != self.progress:
            self.stalled_at = self.progress
            for warp in self.mbarrier_waits:
                self.timed_out[warp] = True
                self.m.blocked[warp] = False
            self.mbarrier_waits.clear()
            return
        warps = np.flatnonzero(self.m.blocked)
        lines = []
        for warp in warps[:8]:
            ins = self.waiting_for[int(warp)]
            cta, local = self.m.place(int(warp))
            lines.append(f"CTA {cta} warp {local} at line {ins.line}: {ins.text}")
        more = f" and {len(warps) - 8} more" if len(warps) > 8 else ""
        first = int(warps[0])
        self.m.fail(
            "deadlock", self.waiting_for[first], "no warp can go on; waiting: " + "; ".join(lines) + more, first
        )
