"""Arithmetic, logic, comparison and conversion."""

from __future__ import annotations

import numpy as np

from .constants import TYPES
from .parser import Instruction, Pair, Special, Vec
from .table import expect_parts, operation, unsupported

TINY = np.float32(2.0**-126)
_FLOATS = ("f32", "f64", "f16", "bf16", "f32x2", "f16x2", "bf16x2")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN becomes 0x7fff as on the hardware."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as bits; NaN becomes 0x7fff as on the hardware."""
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign."""
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


def _fma32(a, b, c):
    return (np.float64(1) * a * b + c).astype(np.float32)


def _fma64(a, b, c):
    # A longdouble keeps 64 bits: close to, not always, the fused result.
    return (np.longdouble(1) * a * b + c).astype(np.float64)


def _directed(terms, rounding: str):
    """A sum rounded down (rm), up (rp) or toward zero (rz); terms(*values): two float64 whose exact sum it is."""

    def fn(*values):
        a, b = terms(*(np.asarray(v, np.float64) for v in values))
        high = a + b
        # Knuth's sum: high + low is a + b exactly.
        low = (a - (high - (high - a))) + (b - (high - a))
        near = np.asarray(high.astype(np.float32))
        rest = (high - near) + low
        down, up = rest < 0, rest > 0
        if rounding == "rz":
            down, up = down & (near > 0), up & (near < 0)
        if rounding != "rp":
            near = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
        if rounding != "rm":
            near = np.where(up, np.nextafter(near, np.float32(np.inf)), near)
        if rounding == "rm":
            near = np.where((high == 0) & (np.signbit(a) | np.signbit(b)), np.float32(-0.0), near)
        return near

    return fn


_TERMS = {"add": lambda a, b: (a, b), "sub": lambda a, b: (a, -b), "fma": lambda a, b, c: (a * b, c)}


def _check_modifiers(ins: Instruction, modifiers, allowed: tuple[str, ...]) -> None:
    if any(m not in allowed for m in modifiers):
        raise unsupported(ins)


def _packed(m, operand, dtype):
    """Reader of a 64- or 32-bit register as two values, shape (n, 32, 2)."""
    if isinstance(operand, Vec):
        raise KeyError(operand)
    if hasattr(operand, "value"):
        return lambda S: m.constant(operand, np.uint64 if dtype == np.float32 else np.uint32)
    wide = m.view(operand, np.uint64 if dtype == np.float32 else np.uint32)
    array = wide.view(dtype).reshape(m.warps, 32, 2)
    return array.__getitem__


def _simple(m, ins: Instruction, fn, dtype: str, ftz: bool = False, out: str | None = None):
    """step for d = fn(sources), elementwise."""
    sources = [m.read(a, dtype) for a in ins.args[1:]]
    store = m.write(ins.args[0], out or dtype)
    if isinstance(fn, np.ufunc) and not ftz and out is None and fn.nin == len(sources) == 2 and dtype != "pred":
        target = m.view(ins.args[0], TYPES[dtype])
        a, b = sources

        def fast(S, mask):
            if mask is None and S.__class__ is slice:
                fn(a(S), b(S), out=target[S])
            else:
                store(S, mask, fn(a(S), b(S)))

        return fast

    def step(S, mask):
        values = [s(S) for s in sources]
        if ftz:
            values = [flush(v) for v in values]
        result = fn(*values)
        store(S, mask, flush(result) if ftz else result)

    return step


def _half(m, ins: Instruction, fn, dtype: str):
    """Elementwise on f16, bf16 and their pairs: computed in float32, rounded once."""
    pair = dtype.endswith("x2")
    name = dtype.removesuffix("x2")
    half = np.dtype(np.uint16)

    def reader(operand):
        if pair:
            return _packed(m, operand, half)
        return m.read(operand, half)

    sources = [reader(a) for a in ins.args[1:]]
    store = m.write(ins.args[0], "b32" if pair else "b16")

    def step(S, mask):
        bits = [np.ascontiguousarray(s(S)) for s in sources]
        values = [bf16_to_f32(b) if name == "bf16" else b.view(np.float16).astype(np.float32) for b in bits]
        result = np.asarray(fn(*values), np.float32)
        rounded = f32_to_bf16(result) if name == "bf16" else f32_to_f16(result)
        store(S, mask, np.ascontiguousarray(rounded).view(np.uint32)[..., 0] if pair else rounded)

    return step


def _float_pairs(m, ins: Instruction, fn, ftz: bool):
    """Elementwise on f32x2: two float32 in a 64-bit register."""
    sources = [_packed(m, a, np.dtype(np.float32)) for a in ins.args[1:]]
    if any(hasattr(a, "value") for a in ins.args[1:]):
        raise unsupported(ins)
    store = m.write(ins.args[0], "b64")

    def step(S, mask):
        values = [s(S) for s in sources]
        if ftz:
            values = [flush(v) for v in values]
        result = np.ascontiguousarray(fn(*values), np.float32)
        store(S, mask, (flush(result) if ftz else result).view(np.uint64)[..., 0])

    return step


def _float(m, ins: Instruction, fn32, allowed=("rn", "ftz")):
    dtype = ins.parts[-1]
    modifiers = ins.parts[1:-1]
    rounding = next((r for r in modifiers if r in ("rz", "rm", "rp")), None)
    if rounding and dtype == "f32" and ins.parts[0] in _TERMS:
        modifiers = tuple(m for m in modifiers if m != rounding)
        fn32 = _directed(_TERMS[ins.parts[0]], rounding)
    _check_modifiers(ins, modifiers, allowed)
    if dtype == "f32x2":
        return _float_pairs(m, ins, fn32, "ftz" in modifiers)
    if dtype in ("f16", "bf16", "f16x2", "bf16x2"):
        return _half(m, ins, fn32, dtype)
    return _simple(m, ins, fn32, dtype, "ftz" in modifiers and dtype == "f32")


@operation("add", "sub")
def _add(m, ins):
    fn = np.add if ins.parts[0] == "add" else np.subtract
    if ins.parts[1:] in (("rn", "f32", "bf16"), ("rn", "f32", "f16")):
        return _add_half(m, ins, fn)
    if ins.parts[-1] in _FLOATS:
        return _float(m, ins, fn)
    _check_modifiers(ins, ins.parts[1:-1], ())
    return _simple(m, ins, fn, ins.parts[-1])


def _add_half(m, ins: Instruction, fn):
    """f32 = a, which is f16 or bf16, with the f32 c."""
    half, c, store = m.read(ins.args[1], np.dtype(np.uint16)), m.read(ins.args[2], "f32"), m.write(ins.args[0], "f32")
    bf16 = ins.parts[-1] == "bf16"

    def step(S, mask):
        bits = np.ascontiguousarray(half(S))
        a = bf16_to_f32(bits) if bf16 else bits.view(np.float16).astype(np.float32)
        store(S, mask, fn(a, c(S)))

    return step


def _wide(dtype: str) -> str:
    return dtype[0] + str(int(dtype[1:]) * 2)


def _high(a, b):
    """High half of a 32-bit product."""
    wide = np.int64 if np.asarray(a).dtype.kind == "i" else np.uint64
    return ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(32)).astype(np.asarray(a).dtype)


@operation("mul")
def _mul(m, ins):
    dtype = ins.parts[-1]
    if dtype in _FLOATS:
        return _float(m, ins, np.multiply)
    expect_parts(ins, 3)
    mode = ins.parts[1]
    if mode == "lo":
        return _simple(m, ins, np.multiply, dtype)
    if mode == "hi" and dtype in ("s32", "u32"):
        return _simple(m, ins, _high, dtype)
    if mode == "hi" and dtype == "u64":
        return _simple(m, ins, _high64, dtype)
    if mode == "wide":
        out = _wide(dtype)
        wide = np.dtype(f"{'i' if dtype[0] == 's' else 'u'}{int(out[1:]) // 8}")
        return _simple(m, ins, lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide), dtype, out=out)
    raise unsupported(ins)


def _high64(a, b):
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    return a1 * b1 + (middle >> shift) + ((a0 * b1 + (middle & low)) >> shift)


@operation("mad")
def _mad(m, ins):
    mode, dtype = ins.parts[1], ins.parts[-1]
    if dtype in _FLOATS:
        return _fma(m, ins)
    expect_parts(ins, 3)
    if mode == "lo":
        return _simple(m, ins, lambda a, b, c: a * b + c, dtype)
    if mode == "hi" and dtype in ("s32", "u32"):
        return _simple(m, ins, lambda a, b, c: _high(a, b) + c, dtype)
    if mode != "wide":
        raise unsupported(ins)
    out = _wide(dtype)
    wide = np.dtype(f"{'i' if dtype[0] == 's' else 'u'}{int(out[1:]) // 8}")
    a, b, c = m.read(ins.args[1], dtype), m.read(ins.args[2], dtype), m.read(ins.args[3], out)
    store = m.write(ins.args[0], out)
    return lambda S, mask: store(S, mask, np.asarray(a(S)).astype(wide) * np.asarray(b(S)).astype(wide) + c(S))


@operation("fma")
def _fma(m, ins):
    if "relu" in ins.parts:
        if ins.parts[1:-1] != ("rn", "relu") or ins.parts[-1] not in ("f16", "bf16", "f16x2", "bf16x2"):
            raise unsupported(ins)
        return _half(m, ins, lambda *values: np.maximum(_fma32(*values), np.float32(0)), ins.parts[-1])
    return _float(m, ins, _fma64 if ins.parts[-1] == "f64" else _fma32, ("rn", "ftz"))


@operation("div", "rem")
def _div(m, ins):
    name, dtype = ins.parts[0], ins.parts[-1]
    if dtype in ("f32", "f64") and name == "div":
        _check_modifiers(ins, ins.parts[1:-1], ("rn", "full", "approx", "ftz"))
        return _simple(m, ins, np.divide, dtype, "ftz" in ins.parts)
    expect_parts(ins, 2)

    def divide(a, b):
        a, b = np.broadcast_arrays(a, b)
        zero = b == 0
        safe = np.where(zero, b.dtype.type(1), b)
        rest = np.fmod(a, safe)
        if name == "rem":
            return np.where(zero, a, rest)
        return np.where(zero, np.array(-1).astype(a.dtype), (a - rest) // safe)

    return _simple(m, ins, divide, dtype)


@operation("min", "max")
def _minmax(m, ins):
    is_min, dtype = ins.parts[0] == "min", ins.parts[-1]
    modifiers = ins.parts[1:-1]
    if dtype not in _FLOATS:
        fn = np.minimum if is_min else np.maximum
        if modifiers == ("relu",) and dtype == "s32":
            return _simple(m, ins, lambda a, b: np.maximum(fn(a, b), np.int32(0)), dtype)
        _check_modifiers(ins, modifiers, ())
        return _simple(m, ins, fn, dtype)
    _check_modifiers(ins, modifiers, ("ftz", "NaN"))
    quiet = (np.fmin, np.fmax) if "NaN" not in modifiers else (np.minimum, np.maximum)
    fn = quiet[0] if is_min else quiet[1]

    def reduce(*values):
        result = fn(values[0], values[1])
        return fn(result, values[2]) if len(values) == 3 else result

    if dtype in ("f16", "bf16", "f16x2", "bf16x2"):
        return _half(m, ins, reduce, dtype)
    return _simple(m, ins, reduce if len(ins.args) == 4 else fn, dtype, "ftz" in modifiers)


@operation("neg", "abs", "not", "cnot")
def _unary(m, ins):
    name, dtype = ins.parts[0], ins.parts[-1]
    _check_modifiers(ins, ins.parts[1:-1], ("ftz",) if dtype == "f32" else ())
    if dtype in ("bf16", "bf16x2", "f16", "f16x2") and name in ("neg", "abs"):
        sign = 0x8000 if dtype in ("bf16", "f16") else 0x80008000
        store_type = "b16" if sign == 0x8000 else "b32"
        kind = np.uint16 if sign == 0x8000 else np.uint32
        fn = (
            (lambda a: a ^ kind(sign))
            if name == "neg"
            else (lambda a: a & kind(~sign & (0xFFFF if kind is np.uint16 else 0xFFFFFFFF)))
        )
        return _simple(m, ins, fn, store_type)
    if name == "not" and dtype == "pred":
        return _simple(m, ins, np.logical_not, dtype)
    if name == "cnot":
        return _simple(m, ins, lambda a: (a == 0).astype(a.dtype), dtype)
    fn = {"neg": np.negative, "abs": np.abs, "not": np.invert}[name]
    return _simple(m, ins, fn, dtype, "ftz" in ins.parts)


@operation("and", "or", "xor")
def _logic(m, ins):
    name, dtype = ins.parts[0], ins.parts[-1]
    expect_parts(ins, 2)
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return _simple(m, ins, fn, dtype)


@operation("shl", "shr")
def _shift(m, ins):
    expect_parts(ins, 2)
    left, dtype = ins.parts[0] == "shl", ins.parts[-1]
    a, count = m.read(ins.args[1], dtype), m.read(ins.args[2], "u32")
    store = m.write(ins.args[0], dtype)
    bits = int(dtype[1:])
    signed = dtype[0] == "s"

    def step(S, mask):
        value, n = a(S), count(S)
        kind = value.dtype.type
        if np.ndim(n) == 0 and n < bits:
            result = value << kind(n) if left else value >> kind(n)
        else:
            inside = np.minimum(n, np.uint32(bits - 1)).astype(value.dtype)
            result = value << inside if left else value >> inside
            if not signed or left:
                result = np.where(np.asarray(n) >= bits, kind(0), result)
        store(S, mask, result)

    return step


@operation("shf")
def _funnel(m, ins):
    expect_parts(ins, 4)
    direction, mode = ins.parts[1], ins.parts[2]
    if direction not in ("l", "r") or mode not in ("wrap", "clamp") or ins.parts[3] != "b32":
        raise unsupported(ins)
    a, b, c = (m.read(x, "b32") for x in ins.args[1:])
    store = m.write(ins.args[0], "b32")

    def step(S, mask):
        count = np.asarray(c(S))
        count = (count & np.uint32(31) if mode == "wrap" else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = (np.asarray(b(S)).astype(np.uint64) << np.uint64(32)) | np.asarray(a(S)).astype(np.uint64)
        result = (both << count) >> np.uint64(32) if direction == "l" else both >> count
        store(S, mask, result.astype(np.uint32))

    return step


@operation("bfe", "bfi", "bfind", "clz", "popc", "brev")
def _bits(m, ins):
    expect_parts(ins, 2)
    name, dtype = ins.parts[0], ins.parts[-1]
    if int(dtype[1:]) != 32 or name in ("bfi", "bfind"):
        raise unsupported(ins)
    if name == "bfe":
        if dtype[0] != "u":
            raise unsupported(ins)

        def extract(a, position, length):
            position, length = position & np.uint32(255), length & np.uint32(255)
            wide = np.asarray(a).astype(np.uint64) >> np.minimum(position, 63).astype(np.uint64)
            return (wide & ((np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1))).astype(
                np.uint32
            )

        return _simple(m, ins, extract, "u32")

    def count(a):
        bits = np.unpackbits(np.ascontiguousarray(a).astype(">u4").view(np.uint8).reshape(*a.shape, 4), axis=-1)
        if name == "popc":
            return bits.sum(-1).astype(np.uint32)
        if name == "clz":
            return np.where(bits.any(-1), bits.argmax(-1), 32).astype(np.uint32)
        return np.packbits(bits[..., ::-1], axis=-1).view(">u4")[..., 0].astype(np.uint32)

    return _simple(m, ins, count, "b32")


@operation("lop3")
def _lop3(m, ins):
    expect_parts(ins, 2)
    table = ins.args[4].value
    a, b, c = (m.read(x, "b32") for x in ins.args[1:4])
    store = m.write(ins.args[0], "b32")

    def step(S, mask):
        x, y, z = a(S), b(S), c(S)
        result = np.uint32(0)
        for case in range(8):
            if table >> case & 1:
                result = result | ((x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z))
        store(S, mask, result)

    return step


@operation("prmt")
def _prmt(m, ins):
    if ins.parts != ("prmt", "b32"):
        raise unsupported(ins)
    a, b, c = (m.read(x, "b32") for x in ins.args[1:])
    store = m.write(ins.args[0], "b32")

    def step(S, mask):
        x, y, control = np.broadcast_arrays(a(S), b(S), c(S))
        both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
        result = np.zeros(x.shape, np.uint32)
        for byte in range(4):
            pick = (control >> np.uint32(4 * byte)).astype(np.uint64) & np.uint64(15)
            value = (both >> ((pick & np.uint64(7)) << np.uint64(3))) & np.uint64(255)
            sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
            value = np.where(pick & np.uint64(8), sign, value)
            result |= (value << np.uint64(8 * byte)).astype(np.uint32)
        store(S, mask, result)

    return step


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool):
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED:
        fn = _COMPARE[_UNORDERED[name]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return _COMPARE[name]


def _read_number(m, operand, dtype: str):
    """As m.read, bf16 as the float32 of the same value."""
    read = m.read(operand, dtype)
    return (lambda S: bf16_to_f32(read(S))) if dtype == "bf16" else read


@operation("setp")
def _setp(m, ins):
    modifiers, dtype = list(ins.parts[1:-1]), ins.parts[-1]
    ftz = "ftz" in modifiers
    modifiers = [p for p in modifiers if p != "ftz"]
    if len(modifiers) > 2:
        raise unsupported(ins)
    fn = _comparison(modifiers[0], dtype in _FLOATS)
    if dtype.endswith("x2") or (ftz and dtype != "f32"):
        raise unsupported(ins)
    join = _JOIN[modifiers[1]] if len(modifiers) > 1 else None
    a, b = (_read_number(m, operand, dtype) for operand in ins.args[1:3])
    third = m.read(ins.args[3], "pred") if join else None
    destination, other = ins.args[0], None
    if isinstance(destination, Pair):
        destination, other = destination.first, m.write(destination.second, "pred")
    store = m.write(destination, "pred")

    def step(S, mask):
        x, y = a(S), b(S)
        result = fn(flush(x), flush(y)) if ftz else fn(x, y)
        if other:
            other(S, mask, join(~result, third(S)) if join else ~result)
        store(S, mask, join(result, third(S)) if join else result)

    return step


@operation("set")
def _set(m, ins):
    name, out, dtype = ins.parts[1], ins.parts[-2], ins.parts[-1]
    if len(ins.parts) != 4 or out not in ("u32", "s32", "f32") or dtype not in ("u32", "s32", "b32", "f32"):
        raise unsupported(ins)
    fn, a, b = _comparison(name, dtype == "f32"), m.read(ins.args[1], dtype), m.read(ins.args[2], dtype)
    store = m.write(ins.args[0], out)
    true = np.float32(1) if out == "f32" else np.uint32(0xFFFFFFFF).astype({"u32": np.uint32, "s32": np.int32}[out])
    return lambda S, mask: store(S, mask, np.where(fn(a(S), b(S)), true, true.dtype.type(0)))


@operation("selp")
def _selp(m, ins):
    expect_parts(ins, 2)
    dtype = ins.parts[-1]
    a, b, p = m.read(ins.args[1], dtype), m.read(ins.args[2], dtype), m.read(ins.args[3], "pred")
    store = m.write(ins.args[0], dtype)
    return lambda S, mask: store(S, mask, np.where(p(S), a(S), b(S)))


@operation("mov")
def _mov(m, ins):
    expect_parts(ins, 2)
    dtype = ins.parts[-1]
    destination, source = ins.args
    if isinstance(source, Vec):
        count = len(source.items)
        width = f"b{int(dtype[1:]) // count}"
        parts = [m.read(x, width) for x in source.items]
        wide = m.view(destination, np.dtype(f"u{int(dtype[1:]) // 8}"))
        lanes = wide.view(np.dtype(f"u{int(width[1:]) // 8}")).reshape(m.warps, 32, count)
        stores = [_column(lanes, i) for i in range(count)]

        def pack(S, mask):
            values = [p(S) for p in parts]
            for put, value in zip(stores, values, strict=True):
                put(S, mask, value)

        return pack
    if isinstance(destination, Vec):
        count = len(destination.items)
        width = f"b{int(dtype[1:]) // count}"
        wide = m.view(source, np.dtype(f"u{int(dtype[1:]) // 8}"))
        lanes = wide.view(np.dtype(f"u{int(width[1:]) // 8}")).reshape(m.warps, 32, count)
        writers = [m.write(x, width) for x in destination.items]

        def unpack(S, mask):
            values = lanes[S].copy()
            for i, put in enumerate(writers):
                put(S, mask, values[..., i])

        return unpack
    source_is_special = isinstance(source, Special)
    read, store = m.read(source, "u32" if source_is_special and dtype != "u64" else dtype), m.write(destination, dtype)
    return lambda S, mask: store(S, mask, read(S))


def _column(lanes: np.ndarray, i: int):
    column = lanes[..., i]

    def put(S, mask, values):
        if mask is None:
            column[S] = values
        else:
            column[S] = np.where(mask, values, column[S])

    return put
