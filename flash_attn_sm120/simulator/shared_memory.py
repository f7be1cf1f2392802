"""Shared memory of all CTAs of a batch, and the happens-before check of every access to it.

Each granule (the kernel's narrowest access) remembers its last writer, that writer's clock, and each warp's last read.
Agents are a CTA's warps, a warp's cp.async copies, its bulk stores, and the tensor copies of an mbarrier. A warp
carries a vector clock over all agents, and a second one of what a fence.proxy.async has shown to the asynchronous
engine; barriers, waits and mbarrier phases join them.
Source: Flanagan and Freund, FastTrack (2009).
"""

from __future__ import annotations

import numpy as np

from .global_memory import WORDS, MemoryFault

MBARRIER_SLOTS = 48
NOBODY = 0


class SharedMemory:
    """Data, shadow and clocks; all indices are (CTA of the batch) * per-CTA size + offset."""

    def __init__(self, ctas: int, warps: int, nbytes: int, granule: int, base: int):
        self.ctas, self.warps, self.granule, self.base = ctas, warps, granule, base
        self.limit = base + nbytes
        self.stride = -(-self.limit // 128) * 128
        self.shift = granule.bit_length() - 1
        raw = np.zeros(ctas * self.stride, np.uint8)
        self._views = {width: raw.view(dtype) for width, dtype in WORDS.items()}
        self.agents = 1 + 3 * warps + MBARRIER_SLOTS
        granules = raw.size >> self.shift
        self.writer = np.zeros(granules, np.int16)
        self.write_clock = np.zeros(granules, np.int32)
        self.read_clock = np.zeros((granules, 2 * warps), np.int32)
        total = ctas * warps
        # Columns: what the warp knows of each agent, then the same as of a proxy fence.
        self.columns = 2 * self.agents
        self.clock = np.zeros((total, self.columns), np.int32)
        self.cta = np.arange(total) // warps
        self.local = np.arange(total) % warps
        self._byte_base = self.cta * self.stride
        # Set when the kernel has bulk stores: then their reads are looked at too.
        self.bulk_used = False
        self.start()

    def start(self) -> None:
        """Forget everything: a new batch of CTAs begins."""
        self._views[1][:] = 0xCD
        self.writer[:] = NOBODY
        self.write_clock[:] = 0
        self.read_clock[:] = 0
        self.clock[:] = 0
        self.clock[np.arange(len(self.local)), self.warp_agent(np.arange(len(self.local)))] = 1

    def warp_agent(self, warps: np.ndarray) -> np.ndarray:
        return 1 + self.local[warps]

    def copy_agent(self, warps: np.ndarray) -> np.ndarray:
        """The agent that performs a warp's cp.async copies."""
        return 1 + self.warps + self.local[warps]

    def bulk_agent(self, warps: np.ndarray) -> np.ndarray:
        """The agent that reads shared memory for a warp's bulk stores."""
        return 1 + 2 * self.warps + self.local[warps]

    def mbarrier_agent(self, slot: int) -> int:
        return 1 + 3 * self.warps + slot

    def own_clock(self, warps: np.ndarray) -> np.ndarray:
        return self.clock[warps, self.warp_agent(warps)]

    def tick(self, warps: np.ndarray) -> None:
        """What these warps do from now on is later than what they have released."""
        self.clock[warps, self.warp_agent(warps)] += 1

    def _bounds(self, address: np.ndarray, size: int) -> None:
        if (address & np.uint32(size - 1)).any():
            raise MemoryFault("misaligned access", f"{size}-byte shared access", (address & np.uint32(size - 1)) != 0)
        if int(address.min()) < self.base or int(address.max()) + size > self.limit:
            bad = (address < self.base) | (address > self.limit - size)
            raise MemoryFault("out-of-bounds shared access", f"shared memory ends at {self.limit:#x}", bad)

    def _granules(self, flat: np.ndarray, size: int) -> np.ndarray:
        first = flat >> self.shift
        count = size >> self.shift
        return first if count <= 1 else first[..., None] + np.arange(count)

    def _unordered(self, granules: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """True where the last write is not ordered before what the warp does now."""
        known = self.clock.take(warps * self.columns + self.writer.take(granules))
        return self.write_clock.take(granules) > known

    def _who(self, granule: int) -> str:
        agent, n = int(self.writer[granule]) - 1, self.warps
        if agent < n:
            return f"a store of warp {agent}"
        if agent < 2 * n:
            return f"a cp.async of warp {agent - n}"
        return f"a tensor copy that mbarrier {agent - 3 * n} counts"

    def read(
        self, warps: np.ndarray, address: np.ndarray, size: int, column: int | None = None, clock: int | None = None
    ) -> np.ndarray:
        """Words of `size` bytes. `warps` broadcasts to `address`; `column` and `clock` name an asynchronous reader."""
        self._bounds(address, size)
        flat = self._byte_base[warps] + address
        self.check_read(warps, flat, size, column, clock)
        return self._views[size].take(flat >> (size.bit_length() - 1))

    def check_read(self, warps, flat, size: int, column: int | None = None, clock: int | None = None) -> None:
        """The ordering check and the shadow's update for a read at byte positions `flat`."""
        granules = self._granules(flat, size)
        wide = warps if granules.ndim == flat.ndim else np.asarray(warps)[..., None]
        nobody = self.writer.take(granules) == NOBODY
        if nobody.any():
            bad = nobody.any(-1) if nobody.ndim > flat.ndim else nobody
            raise MemoryFault("read of unwritten memory", "shared memory that nothing wrote", bad)
        unordered = self._unordered(granules, wide)
        if unordered.any():
            bad = unordered.any(-1) if unordered.ndim > flat.ndim else unordered
            who = self._who(int(granules[unordered][0]))
            raise MemoryFault("shared-memory race", f"read not ordered after {who}", bad)
        if column is not None:
            self._check_fence(granules, wide, flat.ndim)
        places = granules * (2 * self.warps) + (self.local[wide] if column is None else column)
        clocks = self.own_clock(wide) if clock is None else clock
        self.read_clock.put(places, np.broadcast_to(clocks, places.shape))

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async: all that is ordered before these warps is visible to the asynchronous engine."""
        clock = self.clock
        clock[warps, self.agents :] = np.maximum(clock[warps, self.agents :], clock[warps, : self.agents])

    def _check_fence(self, granules: np.ndarray, warps: np.ndarray, ndim: int) -> None:
        """The asynchronous engine reads: what threads wrote must have passed a proxy fence since."""
        writer = self.writer.take(granules)
        known = self.clock.take(warps * self.columns + self.agents + writer)
        bad = (writer <= 2 * self.warps) & (self.write_clock.take(granules) > known)
        if bad.any():
            who = self._who(int(granules[bad][0]))
            bad = bad.any(-1) if bad.ndim > ndim else bad
            raise MemoryFault("missing proxy fence", f"no fence.proxy.async in shared memory after {who}", bad)

    def write(
        self,
        warps: np.ndarray,
        address: np.ndarray,
        size: int,
        values: np.ndarray,
        agent: np.ndarray | int | None = None,
        clock: np.ndarray | int | None = None,
    ) -> None:
        """Store words; `agent` and `clock` (broadcast to warps) name an asynchronous copy."""
        self._bounds(address, size)
        flat = self._byte_base[warps] + address
        self.check_write(warps, flat, size, agent, clock)
        self._views[size][flat >> (size.bit_length() - 1)] = values

    def check_write(self, warps, flat, size, agent=None, clock=None) -> None:
        """The ordering check and the shadow's update for a write at byte positions `flat`."""
        granules = self._granules(flat, size)
        wide = warps if granules.ndim == flat.ndim else np.asarray(warps)[..., None]
        unordered = self._unordered(granules, wide)
        if unordered.any():
            bad = unordered.any(-1) if unordered.ndim > flat.ndim else unordered
            who = self._who(int(granules[unordered][0]))
            raise MemoryFault("shared-memory race", f"write not ordered after {who}", bad)
        reads = self.read_clock[granules]
        known = self.clock[:, 1 : 1 + self.warps][wide]
        late = reads[..., : self.warps] > known
        if self.bulk_used:
            known = self.clock[:, 1 + 2 * self.warps : 1 + 3 * self.warps][wide]
            late = np.concatenate([late, reads[..., self.warps :] > known], axis=-1)
        if late.any():
            where = late.any(-1)
            bad = where.any(-1) if where.ndim > flat.ndim else where
            reader = int(np.argwhere(late)[0][-1])
            who = f"a read of warp {reader}" if reader < self.warps else f"a bulk store of warp {reader - self.warps}"
            raise MemoryFault("shared-memory race", f"write not ordered after {who}", bad)
        agents = self.warp_agent(wide) if agent is None else self._align(agent, granules, flat)
        clocks = self.own_clock(wide) if clock is None else self._align(clock, granules, flat)
        self.writer[granules] = agents
        self.write_clock[granules] = clocks
        lost = self.writer.take(granules) != agents
        if lost.any():
            bad = lost.any(-1) if lost.ndim > flat.ndim else lost
            raise MemoryFault("shared-memory race", "two warps write the same place", bad)

    @staticmethod
    def _align(value, granules: np.ndarray, flat: np.ndarray):
        return np.asarray(value)[..., None] if granules.ndim > flat.ndim and np.ndim(value) else value

    def words(self, width: int) -> np.ndarray:
        return self._views[width]
