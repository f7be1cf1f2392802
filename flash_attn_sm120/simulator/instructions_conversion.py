"""Conversions between types and the approximated functions."""

from __future__ import annotations

import numpy as np

from . import special_functions
from .constants import PARAM_WINDOW, SHARED_WINDOW
from .instructions_arithmetic import bf16_to_f32, f32_to_bf16, f32_to_f16, flush
from .parser import Instruction
from .table import expect_parts, operation, unsupported

_INTEGERS = {f"{k}{n}": np.dtype(f"{'i' if k == 's' else 'u'}{n // 8}") for k in "sub" for n in (8, 16, 32, 64)}
_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FP8 = {"e4m3x2": (4, 7, 448.0), "e5m2x2": (5, 15, 57344.0)}


def fp8_values(kind: str) -> np.ndarray:
    """The 256 values of an fp8 type ('e4m3x2' or 'e5m2x2') as float32."""
    exponent_bits, bias, _ = _FP8[kind]
    mantissa_bits = 7 - exponent_bits
    code = np.arange(256)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    normal = np.ldexp(1 + mantissa / (1 << mantissa_bits), exponent - bias)
    small = np.ldexp(mantissa / (1 << mantissa_bits), 1 - bias)
    value = np.where(exponent == 0, small, normal)
    if kind == "e4m3x2":
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    else:
        top = exponent == 31
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


def f32_to_fp8(values: np.ndarray, kind: str) -> np.ndarray:
    """Round to nearest even, saturating to the largest finite value (cvt.rn.satfinite); NaN stays NaN."""
    positive = fp8_values(kind)[:128]
    finite = positive[np.isfinite(positive)].astype(np.float64)
    magnitude = np.minimum(np.abs(values).astype(np.float64), finite[-1])
    upper = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    middle = (finite[upper - 1] + finite[upper]) / 2
    code = np.where((magnitude > middle) | ((magnitude == middle) & (upper % 2 == 0)), upper, upper - 1)
    code = np.where(np.signbit(values), code | 0x80, code)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def _to_integer(values: np.ndarray, rounding: str, dtype: np.dtype) -> np.ndarray:
    """Float to integer, saturating; NaN gives 0."""
    info = np.iinfo(dtype)
    rounded = _ROUND_TO_INTEGER[rounding](values.astype(np.float64))
    result = np.clip(rounded, info.min, info.max)
    inside = (rounded > info.min) & (rounded < info.max)
    edge = np.where(rounded >= info.max, info.max, info.min)
    whole = np.where(inside, result, 0).astype(dtype)
    return np.where(np.isnan(values), dtype.type(0), np.where(inside, whole, edge.astype(dtype)))


def _to_float(values: np.ndarray, out: str) -> np.ndarray:
    if out == "bf16":
        return f32_to_bf16(values)
    if out == "f16":
        return f32_to_f16(values)
    return values.astype(np.float32 if out == "f32" else np.float64)


def _reader(m, operand, kind: str):
    """Reader of a scalar of PTX type `kind` as a NumPy value; bf16 comes as float32."""
    if kind == "bf16":
        bits = m.read(operand, "b16")
        return lambda S: bf16_to_f32(np.asarray(bits(S)))
    return m.read(operand, kind)


@operation("cvt")
def _cvt(m, ins: Instruction):
    out, source = ins.parts[-2], ins.parts[-1]
    modifiers = set(ins.parts[1:-2])
    if out in ("bf16x2", "f16x2") and source == "f32":
        return _pack_halves(m, ins, out, modifiers)
    if out in _FP8 or source in _FP8:
        return _cvt_fp8(m, ins, out, source, modifiers)
    ftz = "ftz" in modifiers
    modifiers.discard("ftz")
    saturate = modifiers == {"sat"} and (out, source) == ("f32", "f32")
    if saturate:
        modifiers.clear()
    rounding = next((r for r in modifiers if r in _ROUND_TO_INTEGER), None)
    if modifiers - {"rn", rounding}:
        raise unsupported(ins)
    read = _reader(m, ins.args[1], source)
    store = m.write(ins.args[0], {"bf16": "b16", "f16": "b16"}.get(out, out))
    if out in _INTEGERS and source in _INTEGERS:
        dtype = _INTEGERS[out]
        return lambda S, mask: store(S, mask, np.asarray(read(S)).astype(dtype))
    if out in _INTEGERS:
        if rounding is None:
            raise unsupported(ins)
        return lambda S, mask: store(S, mask, _to_integer(np.asarray(read(S)), rounding, _INTEGERS[out]))

    def step(S, mask):
        values = np.asarray(read(S))
        if ftz and values.dtype == np.float32:
            values = flush(values)
        if rounding:
            values = _ROUND_TO_INTEGER[rounding](values)
        if saturate:  # to 0..1, NaN to 0
            values = np.fmin(np.fmax(values, np.float32(0)), np.float32(1))
        store(S, mask, _to_float(values, out))

    return step


def _pack_halves(m, ins: Instruction, out: str, modifiers: set[str]):
    """cvt.rn.{bf16x2,f16x2}.f32 d, a, b: a goes to the upper half."""
    if modifiers - {"rn", "relu"}:
        raise unsupported(ins)
    high, low = m.read(ins.args[1], "f32"), m.read(ins.args[2], "f32")
    store = m.write(ins.args[0], "b32")
    convert = f32_to_bf16 if out == "bf16x2" else f32_to_f16
    relu = "relu" in modifiers

    def step(S, mask):
        a, b = np.asarray(high(S)), np.asarray(low(S))
        if relu:
            a, b = np.maximum(a, np.float32(0)), np.maximum(b, np.float32(0))
        store(S, mask, (convert(a).astype(np.uint32) << np.uint32(16)) | convert(b))

    return step


def _cvt_fp8(m, ins: Instruction, out: str, source: str, modifiers: set[str]):
    if out in _FP8 and source == "f32" and modifiers == {"rn", "satfinite"}:
        high, low = m.read(ins.args[1], "f32"), m.read(ins.args[2], "f32")
        store = m.write(ins.args[0], "b16")

        def narrow(S, mask):
            a, b = f32_to_fp8(np.asarray(high(S)), out), f32_to_fp8(np.asarray(low(S)), out)
            store(S, mask, (a.astype(np.uint16) << np.uint16(8)) | b)

        return narrow
    if source in _FP8 and out == "f16x2" and modifiers == {"rn"}:
        values = fp8_values(source).astype(np.float16).view(np.uint16).astype(np.uint32)
        read, write = m.read(ins.args[1], "b16"), m.write(ins.args[0], "b32")

        def widen(S, mask):
            bits = np.asarray(read(S))
            write(S, mask, (values[bits >> np.uint16(8)] << np.uint32(16)) | values[bits & np.uint16(255)])

        return widen
    raise unsupported(ins)


@operation("cvta")
def _cvta(m, ins: Instruction):
    space = ins.parts[-2]
    known = ("global", "shared", "shared::cta", "param")
    if space not in known or ins.parts not in (("cvta", space, "u64"), ("cvta", "to", space, "u64")):
        raise unsupported(ins)
    read, store = m.read(ins.args[1], "u64"), m.write(ins.args[0], "u64")
    shift = np.uint64({"s": SHARED_WINDOW, "p": PARAM_WINDOW}.get(space[0], 0))
    if "to" in ins.parts:
        return lambda S, mask: store(S, mask, read(S) - shift)
    return lambda S, mask: store(S, mask, read(S) + shift)


_APPROXIMATE = {
    "ex2": special_functions.ex2,
    "lg2": special_functions.lg2,
    "rcp": special_functions.rcp,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}
_ROUNDED = {"rcp": np.reciprocal, "sqrt": np.sqrt}


@operation(*_APPROXIMATE)
def _approximate(m, ins: Instruction):
    """ex2, lg2 and rcp as the special function unit gives them, the others within the error that PTX documents."""
    dtype = ins.parts[-1]
    if dtype != "f32" or set(ins.parts[1:-1]) - {"approx", "ftz", "rn"}:
        raise unsupported(ins)
    fn, ftz = (_ROUNDED if "rn" in ins.parts else _APPROXIMATE)[ins.parts[0]], "ftz" in ins.parts
    read, store = m.read(ins.args[1], "f32"), m.write(ins.args[0], "f32")

    def step(S, mask):
        values = np.asarray(read(S))
        store(S, mask, flush(fn(flush(values))) if ftz else fn(values))

    return step


@operation("copysign")
def _copysign(m, ins: Instruction):
    expect_parts(ins, 2)
    a, b = m.read(ins.args[1], "f32"), m.read(ins.args[2], "f32")
    store = m.write(ins.args[0], "f32")
    if ins.parts[-1] != "f32":
        raise unsupported(ins)
    return lambda S, mask: store(S, mask, np.copysign(b(S), a(S)))
