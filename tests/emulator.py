"""AArch64 launchers without an AArch64 machine: a shared object in an emulator, with the simulator's CUDA runtime."""

import ctypes
import mmap
import struct

from flash_attn_sm120.shared_object import text

MEGABYTE = 1 << 20
PAGE = 4096
# cuda_dialect_init_library_once(state, init, load, _): init(state), then load(state, 0).
ONCE = (
    0xA9BE7BFD, 0xA90153F3, 0xAA0003F3, 0xAA0203F4, 0xD63F0020, 0x35000080,
    0xAA1303E0, 0x52800001, 0xD63F0280, 0xA94153F3, 0xA8C27BFD, 0xD65F03C0,
)  # fmt: skip
RETURN = struct.pack("<I", 0xD65F03C0)


def dynamic(shared_object: bytes) -> dict:
    """What dlopen reads of a shared object: segments as (address, offset, bytes in the file, bytes), libraries, symbols
    as (name, value, defined), relocations as (place, kind, symbol's number, addend)."""
    (table,) = struct.unpack_from("<Q", shared_object, 32)
    (count,) = struct.unpack_from("<H", shared_object, 56)
    rows = [struct.unpack_from("<IIQQQQQQ", shared_object, table + 56 * i) for i in range(count)]
    segments = [(row[3], row[2], row[5], row[6]) for row in rows if row[0] == 1]
    (section,) = [row for row in rows if row[0] == 2]
    entries = [struct.unpack_from("<QQ", shared_object, section[2] + 16 * i) for i in range(section[5] // 16)]
    tags = dict(entries)
    symbols, chains = [], struct.unpack_from("<II", shared_object, tags[4])[1]
    for i in range(chains):
        name, _, _, where, value, _ = struct.unpack_from("<IBBHQQ", shared_object, tags[6] + 24 * i)
        symbols.append((text(shared_object, tags[5] + name), value, where != 0))
    relocations = []
    for i in range(tags[8] // 24):
        place, info, addend = struct.unpack_from("<QQq", shared_object, tags[7] + 24 * i)
        relocations.append((place, info & 0xFFFFFFFF, info >> 32, addend))
    libraries = [text(shared_object, tags[5] + value) for tag, value in entries if tag == 1]
    return {"segments": segments, "libraries": libraries, "symbols": symbols, "relocations": relocations}


class Argument(ctypes.Structure):
    """An argument as TVM FFI passes it."""

    _fields_ = [("kind", ctypes.c_int32), ("length", ctypes.c_int32), ("value", ctypes.c_uint64)]


class Emulated:
    """A launcher's shared object in memory of its own, at the same addresses inside the emulator and outside.

    imports: name -> function of the registers x0 to x7 that returns x0."""

    def __init__(self, shared_object: bytes, imports: dict):
        import unicorn
        from unicorn import arm64_const as registers

        self.registers = registers
        self.memory = mmap.mmap(-1, 4 * MEGABYTE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.machine.mem_map_ptr(self.base, 4 * MEGABYTE, unicorn.UC_PROT_ALL, self.base)
        self.machine.reg_write(registers.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is on
        self.imports = imports
        self.places = {}  # address of an import -> its name
        self.used = 3 * MEGABYTE
        self.calls = []
        stubs = self.base + 2 * MEGABYTE
        self.machine.hook_add(unicorn.UC_HOOK_CODE, self._on_import, begin=stubs, end=stubs + MEGABYTE - 1)
        self._load(shared_object)

    def _load(self, shared_object: bytes) -> None:
        found = dynamic(shared_object)
        for address, offset, stored, _ in found["segments"]:
            self.memory[address : address + stored] = shared_object[offset : offset + stored]
        self.symbols = {name: value for name, value, defined in found["symbols"] if defined}
        for place, kind, number, addend in found["relocations"]:
            if kind == 1027:  # RELATIVE
                value = self.base + addend
            else:
                assert kind == 1025  # GLOB_DAT
                value = self._import(found["symbols"][number][0])
            self.memory[place : place + 8] = struct.pack("<Q", value)

    def _import(self, name: str) -> int:
        offset = 2 * MEGABYTE + 64 * len(self.places)
        code = struct.pack(f"<{len(ONCE)}I", *ONCE) if name == "cuda_dialect_init_library_once" else RETURN
        self.memory[offset : offset + len(code)] = code
        self.places[self.base + offset] = name
        return self.base + offset

    def _on_import(self, machine, address, size, data) -> None:
        name = self.places.get(address)
        if name is None or name == "cuda_dialect_init_library_once":
            return
        self.calls.append(name)
        given = [machine.reg_read(getattr(self.registers, f"UC_ARM64_REG_X{i}")) for i in range(8)]
        machine.reg_write(self.registers.UC_ARM64_REG_X0, self.imports[name](*given) & (1 << 64) - 1)

    def put(self, content: bytes) -> int:
        """The address of a copy that the emulated code sees."""
        at = self.used
        self.memory[at : at + len(content)] = content
        self.used += -(-len(content) // 16) * 16
        return self.base + at

    def call(self, symbol: str, arguments: list) -> int:
        """arguments: an Argument each; returns what the function does."""
        registers, machine = self.registers, self.machine
        array = self.put(b"".join(map(bytes, arguments)))
        result = self.put(bytes(16))
        stop = self.base + 4 * MEGABYTE - 64
        for number, value in enumerate((0, array, len(arguments), result)):
            machine.reg_write(getattr(registers, f"UC_ARM64_REG_X{number}"), value)
        machine.reg_write(registers.UC_ARM64_REG_SP, self.base + 4 * MEGABYTE - PAGE)
        machine.reg_write(registers.UC_ARM64_REG_LR, stop)
        machine.emu_start(self.base + self.symbols[symbol], stop)
        return ctypes.c_int32(machine.reg_read(registers.UC_ARM64_REG_X0) & 0xFFFFFFFF).value
