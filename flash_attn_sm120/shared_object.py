"""One relocatable object -> a shared object that dlopen takes, for x86-64 and AArch64, with the standard library alone.

A compiled launcher is a small ELF object: code, constants (the cubin among them), a few zeroed words, calls into two
libraries. Users' machines have no linker, and a build machine none for the other processor; what such an object asks of
one is little: place its sections, fill in addresses, list what dlopen has to look up. Anything that isn't known here is
refused, and such a kernel isn't kept in a file.

Destructors are left out: a launcher is never unloaded before its process ends. So is .eh_frame: no exception passes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MACHINES = {62: "x86_64", 183: "aarch64"}
PAGE = 0x10000  # the largest of either processor
PROGBITS, SYMTAB, RELA, NOBITS = 1, 2, 4, 8
ALLOC, EXECUTABLE, WRITABLE, TLS = 0x2, 0x4, 0x1, 0x400
LEFT_OUT = (".eh_frame", ".fini_array", ".note.GNU-stack")
GOT_NAME = "_GLOBAL_OFFSET_TABLE_"
# Dynamic relocations: an address that is looked up, and one that moves with the library.
LOOKED_UP = {"x86_64": 6, "aarch64": 1025}
RELATIVE = {"x86_64": 8, "aarch64": 1027}
LOADS = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # AArch64's LDSTn_ABS_LO12_NC -> log2 of its bytes
STUB_BYTES = 16
HEADER_BYTES, SEGMENT_BYTES, SYMBOL_BYTES, RELA_BYTES = 64, 56, 24, 24


class NotLinkable(ValueError):
    """The object holds what this linker doesn't know."""


@dataclass
class Section:
    """address: in the shared object, set by the layout; -1 for one that is left out."""

    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    address: int = -1


@dataclass(frozen=True)
class Symbol:
    """section: index of where it is defined, 0 for one of another library."""

    name: str
    section: int
    value: int
    size: int
    is_global: bool


@dataclass(frozen=True)
class Relocation:
    section: Section
    offset: int
    kind: int
    symbol: Symbol
    addend: int


def machine_of(elf: bytes) -> str:
    """x86_64 or aarch64; NotLinkable where the bytes aren't a 64-bit ELF file of either."""
    if len(elf) < HEADER_BYTES or elf[:6] != b"\x7fELF\x02\x01":
        raise NotLinkable(f"expected a 64-bit little-endian ELF file, got {len(elf)} bytes that start {elf[:6].hex()}")
    (machine,) = struct.unpack_from("<H", elf, 18)
    if machine not in MACHINES:
        raise NotLinkable(f"expected an ELF file of {' or '.join(MACHINES.values())}, got machine {machine}")
    return MACHINES[machine]


def link(elf: bytes, exported: str, needed: Sequence[str]) -> bytes:
    """The shared object of a relocatable one. exported: the one function that dlsym finds. needed: sonames of the
    libraries that it calls. NotLinkable where the object holds what isn't known here."""
    return _Linker(elf, exported, needed).link()


def read_sections(elf: bytes) -> list[Section]:
    """The section headers of an ELF file, with names."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    rows = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    texts = rows[names][4]
    return [
        Section(text(elf, texts + name), kind, flags, offset, length, link, info, max(align, 1))
        for name, kind, flags, _, offset, length, link, info, align, _ in rows
    ]


def text(elf: bytes, offset: int) -> str:
    return elf[offset : elf.index(b"\0", offset)].decode()


class _Linker:
    def __init__(self, elf: bytes, exported: str, needed: Sequence[str]) -> None:
        self.elf, self.exported, self.needed = elf, exported, needed
        self.machine = machine_of(elf)
        self.sections = read_sections(elf)
        self.symbols = self._read_symbols()
        self.relocations = list(self._read_relocations())
        defined = [symbol for symbol in self.symbols if symbol.name == exported and symbol.section]
        if not defined:
            raise NotLinkable(f"expected a function {exported}, got none")
        self.entry = defined[0]
        self.slots: dict[str, int] = {}  # name of a symbol -> its place in the table of addresses
        self.stubs: dict[str, int] = {}  # name of a function of another library -> its place among the stubs
        for each in self.relocations:
            if _takes_slot(self.machine, each):
                self.slots.setdefault(each.symbol.name, len(self.slots))
            if _takes_stub(self.machine, each):
                self.slots.setdefault(each.symbol.name, len(self.slots))
                self.stubs.setdefault(each.symbol.name, len(self.stubs))
        self.by_name = {each.symbol.name: each.symbol for each in self.relocations}

    def _read_symbols(self) -> list[Symbol]:
        table = next((section for section in self.sections if section.kind == SYMTAB), None)
        if table is None:
            raise NotLinkable("expected symbols, got none")
        names, found = self.sections[table.link].offset, []
        for offset in range(table.offset, table.offset + table.size, SYMBOL_BYTES):
            name, info, _, section, value, size = struct.unpack_from("<IBBHQQ", self.elf, offset)
            found.append(Symbol(text(self.elf, names + name), section, value, size, info >> 4 != 0))
        return found

    def _read_relocations(self) -> Iterator[Relocation]:
        for table in self.sections:
            target = self.sections[table.info] if table.kind == RELA else None
            if target is None or not target.flags & ALLOC or target.name in LEFT_OUT:
                continue
            for offset in range(table.offset, table.offset + table.size, RELA_BYTES):
                place, info, addend = struct.unpack_from("<QQq", self.elf, offset)
                yield Relocation(target, place, info & 0xFFFFFFFF, self.symbols[info >> 32], addend)

    def link(self) -> bytes:
        foreign = [name for name in self.slots if not self.by_name[name].section]
        tables = _lookup_tables(foreign, self.exported, self.needed)
        code = [s for s in self.sections if s.flags & ALLOC and not s.flags & WRITABLE and s.name not in LEFT_OUT]
        data = [s for s in self.sections if s.flags & ALLOC and s.flags & WRITABLE and s.name not in LEFT_OUT]
        for section in (*code, *data):
            if section.kind not in (PROGBITS, NOBITS) or section.flags & TLS:
                raise NotLinkable(f"section {section.name}: kind {section.kind}, flags {section.flags:#x}")
        data.sort(key=lambda section: section.kind == NOBITS)  # what takes no room in the file comes last

        # Read-only: headers, tables, stubs, sections. Behind it, a page further on, what is written to.
        place = _Places(HEADER_BYTES + 4 * SEGMENT_BYTES)
        self.symtab = place.take(tables.symbols_bytes, 8)
        self.strings = place.take(len(tables.strings), 1)
        self.hash = place.take(len(tables.hash), 8)
        self.rela = place.take(len(self.slots) * RELA_BYTES, 8)
        self.stub_base = place.take(len(self.stubs) * STUB_BYTES, 16)
        for section in code:
            section.address = place.take(section.size, section.align)
        code_end = place.end
        place.end = -(-place.end // 64) * 64 + PAGE
        dynamic_bytes = 16 * (len(self.needed) + 10)
        self.dynamic = place.take(dynamic_bytes, 64)
        self.got = place.take(8 * len(self.slots), 8)
        stored_end = place.end
        for section in data:
            section.address = place.take(section.size, section.align)
            if section.kind == PROGBITS:
                stored_end = place.end

        image = bytearray(stored_end - PAGE)
        self._put(image, self.symtab, tables.symbols(self._address(self.entry), self.entry.size))
        self._put(image, self.strings, tables.strings)
        self._put(image, self.hash, tables.hash)
        self._put(image, self.rela, self._dynamic_relocations(tables))
        self._put(image, self.dynamic, self._dynamic_table(tables, dynamic_bytes))
        for section in (*code, *data):
            if section.kind == PROGBITS:
                self._put(image, section.address, self.elf[section.offset : section.offset + section.size])
        for name, index in self.stubs.items():
            self._put(image, self.stub_base + index * STUB_BYTES, self._stub(name, index))
        for each in self.relocations:
            self._apply(image, each)
        self._put(image, 0, self._headers(code_end, stored_end, place.end))
        return bytes(image)

    def _put(self, image: bytearray, address: int, content: bytes) -> None:
        offset = self._offset(address)
        image[offset : offset + len(content)] = content

    def _offset(self, address: int) -> int:
        """Where in the file an address lies."""
        return address if address < self.dynamic else address - PAGE

    def _address(self, symbol: Symbol) -> int:
        if not 0 < symbol.section < len(self.sections) or self.sections[symbol.section].address < 0:
            raise NotLinkable(f"symbol {symbol.name or symbol.section}: it isn't in a section that is kept")
        return self.sections[symbol.section].address + symbol.value

    def _slot(self, symbol: Symbol) -> int:
        return self.got + 8 * self.slots[symbol.name]

    def _dynamic_relocations(self, tables: _Tables) -> bytes:
        rows = []
        for name, index in self.slots.items():
            symbol, slot = self.by_name[name], self.got + 8 * index
            if symbol.section:
                rows.append(struct.pack("<QQq", slot, RELATIVE[self.machine], self._address(symbol)))
            else:
                rows.append(struct.pack("<QQq", slot, tables.index[name] << 32 | LOOKED_UP[self.machine], 0))
        return b"".join(rows)

    def _dynamic_table(self, tables: _Tables, size: int) -> bytes:
        rows = [(1, offset) for offset in tables.needed]
        rows += [(4, self.hash), (5, self.strings), (6, self.symtab), (10, len(tables.strings)), (11, SYMBOL_BYTES)]
        rows += [(7, self.rela), (8, len(self.slots) * RELA_BYTES), (9, RELA_BYTES)]
        rows += [(30, 8), (0, 0)]  # every address is looked up at once; the end
        return b"".join(struct.pack("<QQ", *row) for row in rows).ljust(size, b"\0")

    def _headers(self, code_end: int, stored_end: int, end: int) -> bytes:
        number = {name: machine for machine, name in MACHINES.items()}[self.machine]
        header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
            "<HHIQQQIHHHHHH", 3, number, 1, 0, HEADER_BYTES, 0, 0, HEADER_BYTES, SEGMENT_BYTES, 4, 64, 0, 0
        )
        start, stored, held = self.dynamic, stored_end - self.dynamic, end - self.dynamic
        dynamic_bytes = self.got - self.dynamic
        segments = (
            (1, 5, 0, 0, code_end, code_end, PAGE),
            (1, 6, self._offset(start), start, stored, held, PAGE),
            (2, 6, self._offset(start), start, dynamic_bytes, dynamic_bytes, 8),
            (0x6474E551, 6, 0, 0, 0, 0, 16),  # a stack that isn't executed
        )
        for kind, flags, offset, address, stored, held, align in segments:
            header += struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, stored, held, align)
        return header

    def _stub(self, name: str, index: int) -> bytes:
        """AArch64: a jump to wherever the table of addresses says."""
        here, slot = self.stub_base + index * STUB_BYTES, self.got + 8 * self.slots[name]
        load = 0xF9400211 | (slot & 0xFFF) >> 3 << 10
        return struct.pack("<IIII", _with_page(0x90000010, slot, here), load, 0xD61F0220, 0xD503201F)

    def _apply(self, image: bytearray, each: Relocation) -> None:
        width = 8 if self.machine == "x86_64" else 4
        if each.section.kind == NOBITS or each.offset + width > each.section.size:
            raise NotLinkable(f"a relocation outside of {each.section.name}")
        here = each.section.address + each.offset
        offset = self._offset(here)
        if self.machine == "x86_64":
            struct.pack_into("<Q", image, offset, self._x86_64(each, here) & (1 << 64) - 1)
        else:
            (word,) = struct.unpack_from("<I", image, offset)
            struct.pack_into("<I", image, offset, self._aarch64(each, here, word))

    def _x86_64(self, each: Relocation, here: int) -> int:
        """The 64-bit field of a relocation, as the psABI defines them."""
        if each.kind == 29 and each.symbol.name == GOT_NAME:  # GOTPC64
            return self.got + each.addend - here
        if each.kind == 25:  # GOTOFF64
            return self._address(each.symbol) + each.addend - self.got
        if each.kind == 27:  # GOT64
            return self._slot(each.symbol) - self.got + each.addend
        raise NotLinkable(f"x86-64 relocation {each.kind} of {each.symbol.name}")

    def _aarch64(self, each: Relocation, here: int, word: int) -> int:
        """The instruction with its relocation, as the ELF for the Arm architecture defines them."""
        if each.kind in (282, 283):  # JUMP26, CALL26
            name = each.symbol.name
            known = name not in self.stubs
            target = self._address(each.symbol) if known else self.stub_base + self.stubs[name] * STUB_BYTES
            return _with_bits(word, (target + each.addend - here) >> 2, 26, 0)
        if each.kind == 275:  # ADR_PREL_PG_HI21
            return _with_page(word, self._address(each.symbol) + each.addend, here)
        if each.kind == 277:  # ADD_ABS_LO12_NC
            return word | (self._address(each.symbol) + each.addend & 0xFFF) << 10
        if each.kind in LOADS:
            low = self._address(each.symbol) + each.addend & 0xFFF
            if low & (1 << LOADS[each.kind]) - 1:
                raise NotLinkable(f"a load of {1 << LOADS[each.kind]} bytes from {low:#x}")
            return word | low >> LOADS[each.kind] << 10
        if each.kind == 311:  # ADR_GOT_PAGE
            return _with_page(word, self._slot(each.symbol), here)
        if each.kind == 312:  # LD64_GOT_LO12_NC
            return word | (self._slot(each.symbol) & 0xFFF) >> 3 << 10
        raise NotLinkable(f"AArch64 relocation {each.kind} of {each.symbol.name}")


def _takes_slot(machine: str, each: Relocation) -> bool:
    return each.kind == 27 if machine == "x86_64" else each.kind in (311, 312)


def _takes_stub(machine: str, each: Relocation) -> bool:
    return machine == "aarch64" and each.kind in (282, 283) and not each.symbol.section


def _with_bits(word: int, value: int, bits: int, at: int) -> int:
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise NotLinkable(f"a distance of {value} words, {bits} bits hold it")
    return word | (value & (1 << bits) - 1) << at


def _with_page(word: int, target: int, here: int) -> int:
    """adrp with the distance in pages of 4 KB."""
    pages = (target >> 12) - (here >> 12)
    _with_bits(0, pages, 21, 0)
    return word | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5


class _Places:
    def __init__(self, end: int) -> None:
        self.end = end

    def take(self, size: int, align: int) -> int:
        start = -(-self.end // align) * align
        self.end = start + size
        return start


@dataclass(frozen=True)
class _Tables:
    """What dlopen and dlsym read. needed: where in strings the libraries' names stand; index: symbol -> its number."""

    strings: bytes
    hash: bytes
    needed: list[int]
    index: dict[str, int]
    symbols_bytes: int
    symbols: Callable[[int, int], bytes]


def _lookup_tables(foreign: Sequence[str], exported: str, needed: Sequence[str]) -> _Tables:
    names = [*foreign, exported]
    strings, places = bytearray(b"\0"), {}
    for name in (*names, *needed):
        places[name] = len(strings)
        strings += name.encode() + b"\0"
    last = len(names)  # symbols count from 1; the exported one is the last, and alone in the hash table's chain
    chains = [0] * (last + 1)
    hash_table = struct.pack(f"<{4 + last}I", 1, last + 1, last, *chains)

    def symbols(address: int, size: int) -> bytes:
        rows = [b"\0" * SYMBOL_BYTES]
        rows += [struct.pack("<IBBHQQ", places[name], 0x10, 0, 0, 0, 0) for name in foreign]
        rows.append(struct.pack("<IBBHQQ", places[exported], 0x12, 0, 1, address, size))
        return b"".join(rows)

    index = {name: i + 1 for i, name in enumerate(names)}
    bytes_ = SYMBOL_BYTES * (last + 1)
    return _Tables(bytes(strings), hash_table, [places[name] for name in needed], index, bytes_, symbols)
