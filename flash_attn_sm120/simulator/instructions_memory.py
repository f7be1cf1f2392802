"""Loads, stores, cp.async and atomics."""

from __future__ import annotations

import numpy as np

from .constants import PARAM_WINDOW, SHARED_WINDOW, TYPES
from .global_memory import WORDS, MemoryFault
from .parser import Instruction, Mem, Sym, Vec
from .table import operation, unsupported

_QUALIFIERS = {
    "volatile", "relaxed", "acquire", "release", "weak", "cta", "cluster", "gpu", "sys",
    "nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt",
    "v2", "v4", "v8", "unified", "shared", "global", "local", "param", "const",
}  # fmt: skip


def address_reader(m, operand: Mem, dtype: str):
    """Reader of [base + offset] as `dtype` ('u32' for shared, 'u64' for the rest)."""
    kind = np.dtype(np.uint32 if dtype == "u32" else np.uint64)
    if isinstance(operand.base, Sym):
        value = m.constant(operand.base, kind) + kind.type(operand.offset)
        return lambda S: np.full((len(m.warp_ids[S]), 32), value)
    read = m.read(operand.base, kind)
    if operand.offset == 0:
        return read
    offset = np.array(operand.offset & ((1 << 8 * kind.itemsize) - 1), kind)[()]
    return lambda S: read(S) + offset


def _space(ins: Instruction) -> str:
    for part in ins.parts[1:]:
        name = part.split("::")[0]
        if name in ("global", "shared", "local", "param", "const"):
            return name
    return "generic"


def _vector(operand) -> tuple:
    return operand.items if isinstance(operand, Vec) else (operand,)


def _layout(ins: Instruction, operand) -> tuple[str, int, int, tuple]:
    """(type, bytes of an element, bytes in all, registers); unknown qualifiers raise."""
    for part in ins.parts[1:-1]:
        if part.split("::")[0] not in _QUALIFIERS and not part.startswith(("L1", "L2")):
            raise unsupported(ins)
    registers = _vector(operand)
    dtype = ins.parts[-1]
    size = int(dtype[1:] if dtype[0] != "b" or dtype[1:].isdigit() else dtype[2:]) // 8
    return dtype, size, size * len(registers), registers


def _split_words(values: np.ndarray, size: int, count: int) -> np.ndarray:
    """Words of size*count bytes as (..., count) words of `size` bytes."""
    dtype = WORDS[size]
    return np.ascontiguousarray(values)[..., None].view(dtype).reshape(*values.shape, count)


def _scatter(m, ins, dtype, registers):
    """Function (warps, lanes, mask, S, words) that writes loaded words to registers."""
    writers = [m.write(r, dtype) for r in registers]

    def put(S, mask, words):
        for i, store in enumerate(writers):
            value = words[..., i]
            if mask is not None:
                full = np.zeros(mask.shape, value.dtype)
                full[mask] = value
                value = full
            store(S, mask, value.view(_signed(dtype, value.dtype)))

    return put


def _signed(dtype: str, words: np.dtype) -> np.dtype:
    return np.dtype(f"i{words.itemsize}") if dtype[0] == "s" else words


def _resolve(m, space: str, warps, address) -> str:
    """The space of generic addresses; a mixture is not understood."""
    if space != "generic":
        return space
    if (address >= np.uint64(PARAM_WINDOW)).all():
        return "param"
    inside = address >= np.uint64(SHARED_WINDOW)
    if inside.all():
        return "shared"
    return "global" if not inside.any() else "mixed"


def _load_words(m, space: str, warps, lanes, address, size: int, ordered: bool = False) -> np.ndarray:
    if space == "global":
        return m.memory.load(address, size, None if ordered else m.cta_numbers(warps))
    if space == "shared":
        return m.shared.read(warps, address.astype(np.uint32), size)
    if space == "local":
        return m.local_memory.view(WORDS[size])[warps, lanes, (address // np.uint64(size)).astype(np.int64)]
    if space == "param":
        offset = (address & np.uint64(PARAM_WINDOW - 1)).astype(np.int64)
        block = np.frombuffer(m.params.ljust(-(-len(m.params) // 16) * 16 + 16, b"\0"), WORDS[size])
        return block[offset // size]
    raise MemoryFault("unsupported access", "one instruction reaches two address spaces", np.ones(address.shape, bool))


@operation("ld", "ldu")
def _ld(m, ins: Instruction):
    space = _space(ins)
    dtype, size, total, registers = _layout(ins, ins.args[0])
    put = _scatter(m, ins, dtype, registers)
    if space == "param":
        return _ld_param(m, ins, size, registers, put)
    if space == "const":
        raise unsupported(ins)
    address = address_reader(m, ins.args[1], "u32" if space == "shared" else "u64")
    chunks = [(o, min(total, 16)) for o in range(0, total, 16)]
    ordered = "gpu" in ins.parts  # may read what other CTAs wrote

    def step(S, mask):
        warps, lanes, where = m.accesses(S, mask, address(S))
        try:
            kind = _resolve(m, space, warps, where)
            words = [_load_words(m, kind, warps, lanes, where + where.dtype.type(o), n, ordered) for o, n in chunks]
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, where)
        parts = [_split_words(w, size, n // size) for w, (_, n) in zip(words, chunks, strict=True)]
        put(S, mask, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))

    return step


def _ld_param(m, ins: Instruction, size: int, registers, put):
    if not isinstance(ins.args[1].base, Sym):
        raise unsupported(ins)
    offset = m.symbols[ins.args[1].base.name] + ins.args[1].base.offset + ins.args[1].offset
    words = np.frombuffer(m.params, WORDS[size], len(registers), offset)

    def step(S, mask):
        count = (len(m.warp_ids[S]), 32) if mask is None else (int(mask.sum()),)
        put(S, mask, np.broadcast_to(words, (*count, len(registers))))

    return step


@operation("st")
def _st(m, ins: Instruction):
    space = _space(ins)
    _, size, total, registers = _layout(ins, ins.args[1])
    if space in ("param", "const"):
        raise unsupported(ins)
    word = WORDS[size]
    sources = [m.read(r, word) for r in registers]
    address = address_reader(m, ins.args[0], "u32" if space == "shared" else "u64")
    chunk = min(total, 16)

    def step(S, mask):
        n = len(m.warp_ids[S])
        values = np.empty((n, 32, len(sources)), word)
        for i, read in enumerate(sources):
            values[..., i] = read(S)
        if mask is not None:
            values = values[mask]
        packed = values.view(WORDS[chunk])
        warps, lanes, where = m.accesses(S, mask, address(S))
        try:
            kind = _resolve(m, space, warps, where)
            for i in range(total // chunk):
                _store_words(m, kind, warps, lanes, where + where.dtype.type(chunk * i), chunk, packed[..., i])
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, where)

    return step


@operation("prefetch")
def _prefetch(m, ins: Instruction):
    """Changes nothing that a program sees, whatever the address."""
    if ins.parts[1:] != ("global", "L2"):
        raise unsupported(ins)
    return lambda S, mask: None


def _store_words(m, space: str, warps, lanes, address, size: int, values) -> None:
    if space == "global":
        m.memory.store(address, size, values, m.cta_numbers(warps))
    elif space == "shared":
        m.shared.write(warps, address.astype(np.uint32), size, values)
    elif space == "local":
        m.local_memory.view(WORDS[size])[warps, lanes, (address // np.uint64(size)).astype(np.int64)] = values
    else:
        raise MemoryFault("unsupported access", f"store to {space} space", np.ones(address.shape, bool))


@operation("cp")
def _cp(m, ins: Instruction):
    parts = ins.parts
    if parts[1] != "async":
        raise unsupported(ins)
    if "bulk" in parts:
        from .tma import bind_bulk

        return bind_bulk(m, ins)
    if parts[2] == "commit_group":
        return lambda S, mask: m.barriers.commit(m.warp_ids[S] if mask is None else m.warp_ids[S][mask.any(1)])
    if parts[2] in ("wait_group", "wait_all"):
        allowed = ins.args[0].value if parts[2] == "wait_group" else -1

        def wait(S, mask):
            m.barriers.wait_group(m.warp_ids[S] if mask is None else m.warp_ids[S][mask.any(1)], allowed)

        return wait
    if parts[2] == "mbarrier":
        from .instructions_mbarrier import bind_copies_arrive

        return bind_copies_arrive(m, ins)
    return _cp_async(m, ins)


def _cp_async(m, ins: Instruction):
    """cp.async.{ca,cg}.shared.global{.L2::cache_hint} [dst], [src], size{, src-size}{, policy}: bytes beyond src-size
    become zero."""
    spaces = [p.split("::")[0] for p in ins.parts[3:] if not p.startswith("L2::")]
    arguments = ins.args[:-1] if "L2::cache_hint" in ins.parts else ins.args
    if ins.parts[2] not in ("ca", "cg") or spaces != ["shared", "global"] or not 3 <= len(arguments) <= 4:
        raise unsupported(ins)
    size = arguments[2].value
    destination, source = address_reader(m, arguments[0], "u32"), address_reader(m, arguments[1], "u64")
    amount = m.read(arguments[3], "u32") if len(arguments) == 4 else (lambda S: np.uint32(size))

    def step(S, mask):
        warps, lanes, target = m.accesses(S, mask, destination(S))
        _, _, origin = m.accesses(S, mask, source(S))
        count = np.broadcast_to(amount(S), (len(m.warp_ids[S]), 32))
        count = count if mask is None else count[mask]
        if (origin & np.uint64(size - 1)).any():
            error = MemoryFault("misaligned access", f"cp.async of {size} bytes", (origin & np.uint64(size - 1)) != 0)
            m.fault(error, ins, warps, lanes, origin)
        try:
            ctas = np.broadcast_to(m.cta_numbers(warps), origin.shape)
            values = _copied_words(m, origin, count, size, ctas)
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, origin)
        try:
            agent, clock = m.shared.copy_agent(warps), m.barriers.copy_number(warps)
            m.shared.write(warps, target, size, values, agent, clock)
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, target)

    return step


def _copied_words(m, origin, count, size: int, ctas: np.ndarray) -> np.ndarray:
    full = count >= size
    if full.all():
        return m.memory.load(origin, size, ctas)
    values = np.zeros(origin.shape, WORDS[size])
    for amount in np.unique(count):
        chosen = full if amount >= size else count == amount
        if amount == 0:
            continue
        try:
            if amount >= size:
                values[chosen] = m.memory.load(origin[chosen], size, ctas[chosen])
            else:
                values[chosen] = _partial(m, origin[chosen], int(amount), size, ctas[chosen])
        except MemoryFault as error:
            bad = np.zeros(origin.shape, bool)
            bad[chosen] = error.bad
            error.bad = bad
            raise
    return values


def _partial(m, origin, amount: int, size: int, ctas: np.ndarray) -> np.ndarray:
    out = np.zeros((*origin.shape, size), np.uint8)
    for byte in range(amount):
        out[..., byte] = m.memory.load(origin + np.uint64(byte), 1, ctas)
    return out.view(WORDS[size])[..., 0]


_ATOMICS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "exch": None,
    "inc": None,
}
_ORDER = ("relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys", "global", "shared", "noftz")


@operation("atom", "red")
def _atom(m, ins: Instruction):
    """Atomics on global memory, one lane after the other."""
    name = next(p for p in ins.parts[1:] if p in _ATOMICS or p == "cas")
    extra = [p for p in ins.parts[1:-1] if p != name and p not in _ORDER]
    numbers = ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64")
    if extra or _space(ins) != "global" or ins.parts[-1] not in numbers:
        raise unsupported(ins)
    operands = ins.args if ins.parts[0] == "atom" else (None, *ins.args)
    dtype = TYPES[ins.parts[-1]]
    address = address_reader(m, operands[1], "u64")
    values = [m.read(v, dtype) for v in operands[2:]]
    store = m.write(operands[0], dtype) if operands[0] is not None else None
    size, word = dtype.itemsize, WORDS[dtype.itemsize]

    def step(S, mask):
        where = address(S)
        inputs = [np.broadcast_to(v(S), where.shape) for v in values]
        before = np.zeros(where.shape, dtype)
        for row, lane in np.argwhere(np.ones(where.shape, bool) if mask is None else mask):
            at = where[row, lane : lane + 1]
            try:
                old = m.memory.load(at, size).view(dtype)[0]
                new = inputs[0][row, lane]
                if name == "inc":
                    new = dtype.type(0) if old >= new else old + dtype.type(1)
                elif name == "cas":
                    new = inputs[1][row, lane] if old == new else old
                elif name != "exch":
                    new = _ATOMICS[name](old, new)
                m.memory.store(at, size, np.array([new], dtype).view(word))
            except MemoryFault as error:
                m.fault(error, ins, m.warp_ids[S][row : row + 1], np.array([lane]), at)
            before[row, lane] = old
        if store:
            store(S, mask, before)

    return step
