"""What a compiled kernel takes of an SM, read off its cubin with nothing but the standard library.

A cubin is an ELF file. Registers and stack stand in its .nv.info section as records (format, attribute, size, payload);
the attributes' numbers are those that the CUDA binary utilities print by name. Shared memory is the size of the
section .nv.shared.<kernel>.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

EIFMT_SVAL = 4  # the record's payload follows it; the other formats hold theirs in the size field
EIATTR_FRAME_SIZE = 0x11
EIATTR_MIN_STACK_SIZE = 0x12
EIATTR_REGCOUNT = 0x2F
SHT_SYMTAB = 2
EM_CUDA = 190


@dataclass(frozen=True, slots=True)
class KernelResources:
    """registers: a thread. stack_bytes: a thread, 0 when nothing spills. shared_bytes: static, a block."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def read(cubin: bytes) -> list[KernelResources]:
    """Every kernel of a cubin, in its order. Raises ValueError where the bytes aren't a 64-bit CUDA ELF file."""
    if len(cubin) < 64 or cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18)[0] != EM_CUDA:
        raise ValueError(f"cubin: expected a 64-bit CUDA ELF file, got {len(cubin)} bytes that start {cubin[:8].hex()}")
    try:
        sections = _sections(cubin)
        symbols = _symbols(cubin, sections)
        found: dict[str, dict[int, int]] = {}
        for section in sections:
            if section.name == ".nv.info":
                for attribute, payload in _records(cubin[section.offset : section.offset + section.size]):
                    if attribute in (EIATTR_REGCOUNT, EIATTR_FRAME_SIZE, EIATTR_MIN_STACK_SIZE):
                        symbol, value = struct.unpack_from("<II", payload)
                        found.setdefault(symbols[symbol], {})[attribute] = value
    except (struct.error, IndexError) as error:
        raise ValueError("cubin: expected a whole CUDA ELF file, got one that is cut short or damaged") from error
    shared = {section.name: section.size for section in sections}
    return [
        KernelResources(
            name,
            values.get(EIATTR_REGCOUNT, 0),
            max(values.get(EIATTR_FRAME_SIZE, 0), values.get(EIATTR_MIN_STACK_SIZE, 0)),
            shared.get(f".nv.shared.{name}", 0),
        )
        for name, values in found.items()
        if f".text.{name}" in shared
    ]


def _sections(elf: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQI", elf, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    return [_Section(_text(elf, names + header[0]), header[1], *header[4:7]) for header in headers]


def _symbols(elf: bytes, sections: list[_Section]) -> list[str]:
    table = next((section for section in sections if section.kind == SHT_SYMTAB), None)
    if table is None:
        return []
    texts = sections[table.link].offset
    offsets = range(table.offset, table.offset + table.size, 24)
    return [_text(elf, texts + struct.unpack_from("<I", elf, offset)[0]) for offset in offsets]


def _records(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) of each record that carries one."""
    position = 0
    while position < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, position)
        position += 4
        if kind == EIFMT_SVAL:
            yield attribute, info[position : position + size]
            position += size


def _text(elf: bytes, offset: int) -> str:
    return elf[offset : elf.index(b"\0", offset)].decode()
