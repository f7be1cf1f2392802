"""Global memory: the tensors that were passed and nothing else, with what was written and what may be read."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

# One NumPy dtype for each access width; complex128 serves as an opaque 16-byte word.
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
HOLE = -1


class MemoryFault(Exception):
    """Raised inside a memory access; the caller adds the place. `bad` marks the faulty accesses."""

    def __init__(self, kind: str, message: str, bad: np.ndarray, tensor: str | None = None):
        super().__init__(message)
        self.kind, self.message, self.bad, self.tensor = kind, message, bad, tensor


@dataclass
class Region:
    """One tensor: name, first byte, element size in bytes, sizes and strides in elements.

    output: it may not be read before it is written; required: the part of it that must be written in full.
    """

    name: str
    base: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    output: bool = False
    required: Region | None = None
    end: int = field(init=False)

    def __post_init__(self) -> None:
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.end = self.base + (1 + last) * self.itemsize if all(self.shape) else self.base

    @property
    def dense(self) -> bool:
        """No bytes between the elements."""
        count = int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1
        return count * self.itemsize == self.end - self.base

    def elements(self, units: np.ndarray, base: int, unit: int) -> np.ndarray:
        """View of `units` (one entry for `unit` bytes, from address `base`) of shape (*shape, units in an element)."""
        ratio = self.itemsize // unit
        start, step = (self.base - base) // unit, units.itemsize
        strides = (*(s * ratio * step for s in self.strides), step)
        return np.lib.stride_tricks.as_strided(units[start:], (*self.shape, ratio), strides)

    def label(self, address: int) -> str:
        """The element at an address, as name[i, j, ...]."""
        left, index = (address - self.base) // self.itemsize, [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.strides[a]):
            if self.strides[axis] > 0 and self.shape[axis] > 1:
                index[axis], left = divmod(left, self.strides[axis])
        return f"{self.name}[{', '.join(map(str, index))}]"


class Arena:
    """A span of memory that one tensor fills, or that several tensors share because their spans interleave."""

    def __init__(self, regions: list[Region]):
        self.regions = regions
        self.base, self.end = min(r.base for r in regions), max(r.end for r in regions)
        self.unit = min(r.itemsize for r in regions)
        units = (self.end - self.base) // self.unit
        self.owner = None
        if len(regions) > 1 or not regions[0].dense:
            self.owner = np.full(units, HOLE, np.int16)
            for number, region in enumerate(regions):
                region.elements(self.owner, self.base, self.unit)[...] = number
        # written: a store reached the unit; guarded: it may not be read before that.
        self.written: np.ndarray | None = None
        self.guarded: np.ndarray | None = None
        # The CTA, plus one, that wrote the unit in this launch.
        self.writer: np.ndarray | None = None
        if any(r.output for r in regions):
            self.track()
            self.guarded = np.zeros(units, bool)
            for region in regions:
                if region.output:
                    region.elements(self.guarded, self.base, self.unit)[...] = True
        self.origin = self.base & ~15
        nbytes = -(-(self.end - self.origin) // 16) * 16
        raw = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.origin), np.uint8)
        self._views = {width: raw.view(dtype) for width, dtype in WORDS.items()}

    def track(self) -> None:
        if self.written is None:
            self.written = np.zeros((self.end - self.base) // self.unit, bool)
            self.writer = np.zeros(len(self.written), np.int32)

    def words(self, width: int) -> np.ndarray:
        """The span's bytes as words of `width` bytes, counted from `origin`."""
        return self._views[width]

    def units(self, address: np.ndarray, size: int) -> np.ndarray:
        """Unit numbers of accesses; one more axis when an access covers several."""
        first = ((address - np.uint64(self.base)) // np.uint64(self.unit)).astype(np.int64)
        count = max(size // self.unit, 1)
        return first if count == 1 else first[..., None] + np.arange(count)

    def check_owner(self, units: np.ndarray, ndim: int, size: int) -> None:
        if self.owner is None:
            return
        bad = self.owner[units] == HOLE
        bad = bad.any(-1) if bad.ndim > ndim else bad
        if bad.any():
            raise MemoryFault("out-of-bounds global access", f"{size}-byte access between the rows of a tensor", bad)

    def check_cta(self, units: np.ndarray, ndim: int, ctas: np.ndarray | None, message: str) -> None:
        """CTAs of a launch run in any order: what one wrote, no other may touch."""
        if ctas is None or self.writer is None:
            return
        before = self.writer[units]
        bad = (before != 0) & (before != (ctas if before.ndim == ndim else np.asarray(ctas)[..., None]) + 1)
        if bad.any():
            raise MemoryFault("global-memory race", message, bad.any(-1) if bad.ndim > ndim else bad)

    def claim(self, units: np.ndarray, ndim: int, ctas: np.ndarray | None) -> None:
        """Note the CTAs that write; two of them on one unit is a race, also when both do it at the same instruction."""
        message = "another CTA of the launch wrote here too"
        self.check_cta(units, ndim, ctas, message)
        if ctas is not None:
            self.writer[units] = (ctas if units.ndim == ndim else ctas[..., None]) + 1
            self.check_cta(units, ndim, ctas, message)

    def region_at(self, address: int) -> Region | None:
        if self.owner is None:
            return self.regions[0]
        number = int(self.owner[(address - self.base) // self.unit])
        return None if number == HOLE else self.regions[number]


class GlobalMemory:
    """All tensors of a launch, found by address."""

    def __init__(self, regions: list[Region]):
        groups: list[list[Region]] = []
        reach = 0
        for region in sorted((r for r in regions if r.end > r.base), key=lambda r: r.base):
            if groups and region.base < reach:
                groups[-1].append(region)
            else:
                groups.append([region])
            reach = max(reach, region.end)
        self.arenas = [Arena(group) for group in groups]
        self._bases = [a.base for a in self.arenas]

    def find(self, address: int) -> Arena | None:
        at = bisect_right(self._bases, address) - 1
        return self.arenas[at] if at >= 0 and address < self.arenas[at].end else None

    def describe(self, address: int) -> str | None:
        """A name for an address, also when it lies a little outside a tensor."""
        arena = self.find(address)
        inside = arena.region_at(address) if arena is not None else None
        if inside is not None:
            return inside.label(address)
        regions = [r for a in self.arenas for r in a.regions]
        near = min(regions, key=lambda r: min(abs(address - r.end), abs(address - r.base)), default=None)
        if near is None:
            return None
        if near.base <= address < near.end:
            return f"a gap between the rows of {near.name}"
        if address >= near.end:
            return f"{address - near.end} bytes past the end of {near.name}"
        return f"{near.base - address} bytes before {near.name}"

    def _split(self, address: np.ndarray, size: int):
        """Pairs (arena, selector) that cover the accesses; selector None stands for all of them."""
        unaligned = (address & np.uint64(size - 1)) != 0
        if unaligned.any():
            raise MemoryFault("misaligned access", f"{size}-byte access", unaligned)
        low, high = int(address.min()), int(address.max())
        arena = self.find(low)
        if arena is not None and high + size <= arena.end:
            return [(arena, None)]
        left, pairs = np.ones(address.shape, bool), []
        for arena in self.arenas:
            inside = (address >= np.uint64(arena.base)) & (address <= np.uint64(max(arena.end - size, 0)))
            if inside.any():
                pairs.append((arena, inside))
                left &= ~inside
        if left.any():
            raise MemoryFault("out-of-bounds global access", f"{size}-byte access outside every tensor passed", left)
        return pairs

    def begin_launch(self) -> None:
        """A launch is ordered after the one before: what that wrote belongs to nobody."""
        for arena in self.arenas:
            if arena.writer is not None:
                arena.writer[:] = 0

    def load(self, address: np.ndarray, size: int, ctas: np.ndarray | None = None) -> np.ndarray:
        """Words of `size` bytes at `address` (uint64, any shape); same shape.

        ctas: who reads, broadcast to `address`; without it the access counts as ordered.
        """
        result = None
        for arena, chosen in self._split(address, size):
            part = address if chosen is None else address[chosen]
            try:
                self._check_load(arena, part, size, _chosen(ctas, address, chosen))
            except MemoryFault as fault:
                fault.bad = _spread(fault.bad, chosen)
                raise
            index = ((part - np.uint64(arena.origin)) >> np.uint64(size.bit_length() - 1)).astype(np.int64)
            values = arena.words(size).take(index)
            if chosen is None:
                return values
            if result is None:
                result = np.zeros(address.shape, WORDS[size])
            result[chosen] = values
        return result

    @staticmethod
    def _check_load(arena: Arena, address: np.ndarray, size: int, ctas: np.ndarray | None) -> None:
        if arena.owner is None and arena.written is None:
            return
        units = arena.units(address, size)
        arena.check_owner(units, address.ndim, size)
        if arena.guarded is not None:
            bad = arena.guarded[units] & ~arena.written[units]
            if bad.any():
                bad = bad.any(-1) if bad.ndim > address.ndim else bad
                raise MemoryFault("read of unwritten memory", "output read before a write", bad)
        arena.check_cta(units, address.ndim, ctas, "read of what another CTA of the launch wrote")

    def store(self, address: np.ndarray, size: int, values: np.ndarray, ctas: np.ndarray | None = None) -> None:
        """Write words of `size` bytes; `values` has the shape of `address`, `ctas` as in load."""
        for arena, chosen in self._split(address, size):
            part = address if chosen is None else address[chosen]
            arena.track()
            units = arena.units(part, size)
            try:
                arena.check_owner(units, part.ndim, size)
                who = _chosen(ctas, address, chosen)
                arena.claim(units, part.ndim, who)
            except MemoryFault as fault:
                fault.bad = _spread(fault.bad, chosen)
                raise
            arena.written[units] = True
            index = ((part - np.uint64(arena.origin)) >> np.uint64(size.bit_length() - 1)).astype(np.int64)
            arena.words(size)[index] = values if chosen is None else values[chosen]

    def missing(self) -> str | None:
        """The first element of a required part that no store reached."""
        for arena in self.arenas:
            for region in arena.regions:
                part = region.required
                if part is None or part.end == part.base:
                    continue
                arena.track()
                written = part.elements(arena.written, arena.base, arena.unit).all(axis=-1)
                if not written.all():
                    index = np.unravel_index(int(np.argmin(written)), part.shape) if part.shape else ()
                    steps = sum(int(i) * s for i, s in zip(index, part.strides, strict=True))
                    return region.label(part.base + steps * part.itemsize)
        return None


def _chosen(ctas: np.ndarray | None, address: np.ndarray, chosen: np.ndarray | None) -> np.ndarray | None:
    if ctas is None:
        return None
    ctas = np.broadcast_to(ctas, address.shape)
    return ctas if chosen is None else ctas[chosen]


def _spread(bad: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
    if chosen is None:
        return bad
    full = np.zeros(chosen.shape, bool)
    full[chosen] = bad
    return full
