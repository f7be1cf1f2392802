"""Each instruction against a plain formula."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from ptx_harness import elementwise

from flash_attn_sm120.simulator import UnsupportedInstruction

N = 256
RNG = np.random.default_rng(7)
I32 = [RNG.integers(-(2**31), 2**31, N).astype(np.int32) for _ in range(3)]
SMALL = [RNG.integers(0, 40, N).astype(np.int32) for _ in range(3)]
I64 = [RNG.integers(-(2**62), 2**62, N) for _ in range(2)]
F32 = [RNG.standard_normal(N).astype(np.float32) * 3 for _ in range(3)]
U32 = [a.view(np.uint32) for a in I32]
for edge in (I32, U32):
    edge[0][:4], edge[1][:4] = (0, 1, 2**31 - 1, 5), (1, 1, 3, 2)
SPECIAL = F32[0].copy()
SPECIAL[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38]


def wrap(values, dtype) -> np.ndarray:
    """Python integers to a NumPy type, modulo its size."""
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([int(v) % (1 << bits) for v in values], f"u{bits // 8}").view(dtype)


def each(function, *arrays):
    return [function(*map(int, row)) for row in zip(*arrays, strict=True)]


INTEGER = [
    ("add.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: a + b),
    ("sub.u32 %o, %a, %b;", U32, np.uint32, lambda a, b, c: a - b),
    ("add.s64 %o, %a, %b;", I64, np.int64, lambda a, b: a + b),
    ("mul.lo.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: a * b),
    ("mul.hi.u32 %o, %a, %b;", U32, np.uint32, lambda a, b, c: a * b >> 32),
    ("mul.hi.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: a * b >> 32),
    ("mul.hi.u64 %o, %a, %b;", [a.view(np.uint64) for a in I64], np.uint64, lambda a, b: a * b >> 64),
    ("mul.wide.s32 %o, %a, %b;", I32, np.int64, lambda a, b, c: a * b),
    ("mul.wide.u32 %o, %a, %b;", U32, np.uint64, lambda a, b, c: a * b),
    ("mad.lo.s32 %o, %a, %b, %c;", I32, np.int32, lambda a, b, c: a * b + c),
    ("mad.lo.s64 %o, %a, %b, %a;", I64, np.int64, lambda a, b: a * b + a),
    ("div.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    ("rem.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: abs(a) % abs(b) * (-1 if a < 0 else 1)),
    ("div.u32 %o, %a, %b;", U32, np.uint32, lambda a, b, c: a // b),
    ("min.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: min(a, b)),
    ("max.u32 %o, %a, %b;", U32, np.uint32, lambda a, b, c: max(a, b)),
    ("min.relu.s32 %o, %a, %b;", I32, np.int32, lambda a, b, c: max(min(a, b), 0)),
    ("max.relu.s32 %o, %a, -5;", I32, np.int32, lambda a, b, c: max(a, 0)),
    ("neg.s32 %o, %a;", I32, np.int32, lambda a, b, c: -a),
    ("abs.s32 %o, %a;", I32, np.int32, lambda a, b, c: abs(a)),
    ("and.b32 %o, %a, %b;", U32, np.uint32, lambda a, b, c: a & b),
    ("or.b32 %o, %a, 0xF0;", U32, np.uint32, lambda a, b, c: a | 0xF0),
    ("xor.b64 %o, %a, %b;", [a.view(np.uint64) for a in I64], np.uint64, lambda a, b: a ^ b),
    ("not.b32 %o, %a;", U32, np.uint32, lambda a, b, c: ~a),
    ("shl.b32 %o, %a, %b;", SMALL, np.uint32, lambda a, b, c: a << b if b < 32 else 0),
    ("shr.u32 %o, %a, 5;", U32, np.uint32, lambda a, b, c: a >> 5),
    ("shr.s32 %o, %a, %b;", [I32[0], SMALL[1]], np.int32, lambda a, b: a >> min(b, 31)),
    ("shf.l.wrap.b32 %o, %a, %b, 7;", U32, np.uint32, lambda a, b, c: (b << 7) | (a >> 25)),
    ("shf.r.wrap.b32 %o, %a, %b, 7;", U32, np.uint32, lambda a, b, c: (a >> 7) | (b << 25)),
    ("lop3.b32 %o, %a, %b, %c, 0x96;", U32, np.uint32, lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 %o, %a, %b, %c, 0xE8;", U32, np.uint32, lambda a, b, c: (a & b) | (a & c) | (b & c)),
    ("prmt.b32 %o, %a, %b, 0x5410;", U32, np.uint32, lambda a, b, c: (a & 0xFFFF) | (b & 0xFFFF) << 16),
    ("prmt.b32 %o, %a, %b, 0x0123;", U32, np.uint32, lambda a, b, c: int.from_bytes(a.to_bytes(4, "little"), "big")),
    ("bfe.u32 %o, %a, 4, 8;", U32, np.uint32, lambda a, b, c: a >> 4 & 255),
    ("popc.b32 %o, %a;", U32, np.uint32, lambda a, b, c: a.bit_count()),
    ("clz.b32 %o, %a;", U32, np.uint32, lambda a, b, c: 32 - a.bit_length()),
    ("brev.b32 %o, %a;", U32, np.uint32, lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    ("cvt.s64.s32 %o, %a;", I32, np.int64, lambda a, b, c: a),
    ("cvt.u64.u32 %o, %a;", U32, np.uint64, lambda a, b, c: a),
    ("cvt.u32.u64 %o, %a;", [a.view(np.uint64) for a in I64], np.uint32, lambda a, b: a),
    ("cvt.u16.u32 %o, %a;", U32, np.uint16, lambda a, b, c: a),
    ("setp.lt.s32 %p1, %a, %b; selp.b32 %o, %a, %c, %p1;", I32, np.int32, lambda a, b, c: a if a < b else c),
    ("setp.hs.u32 %p1, %a, %b; selp.u32 %o, 1, 0, %p1;", U32, np.uint32, lambda a, b, c: int(a >= b)),
    ("setp.gt.s32 %p1, %a, 0; setp.lt.and.s32 %p2, %b, 0, %p1; selp.u32 %o, 1, 0, %p2;", I32, np.int32,
     lambda a, b, c: int(a > 0 and b < 0)),
    ("mov.b32 %o, 7; setp.ne.s32 %p1, %a, 5; @!%p1 mov.b32 %o, %b;", I32, np.int32, lambda a, b, c: b if a == 5 else 7),
    ("mov.b64 {%r5, %r6}, %a; mov.b64 %o, {%r6, %r5};", [a.view(np.uint64) for a in I64], np.uint64,
     lambda a, b: (a >> 32) | (a & 0xFFFFFFFF) << 32),
]  # fmt: skip


@pytest.mark.parametrize("text, inputs, dtype, formula", INTEGER, ids=[case[0] for case in INTEGER])
def test_integer(text, inputs, dtype, formula):
    result = elementwise(text, inputs, dtype)
    np.testing.assert_array_equal(result, wrap(each(formula, *inputs), dtype))


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even, by the definition: the nearer of the two neighbours."""
    bits = values.astype(np.float32).view(np.uint32)
    low, high = bits & np.uint32(0xFFFF0000), (bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)
    rest = bits & np.uint32(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & (low >> 16 & 1 == 1))
    return (np.where(up, high, low) >> 16).astype(np.uint16)


def fma(a, b, c):
    return np.array([np.float32(math.fsum([float(x) * float(y), float(z)])) for x, y, z in zip(a, b, c, strict=True)])


@pytest.mark.parametrize(
    "text, formula",
    [
        ("add.f32 %o, %a, %b;", lambda a, b, c: a + b),
        ("sub.rn.f32 %o, %a, %b;", lambda a, b, c: a - b),
        ("mul.f32 %o, %a, 0f40000000;", lambda a, b, c: a * np.float32(2)),
        ("fma.rn.f32 %o, %a, %b, %c;", fma),
        ("max.f32 %o, %a, %b;", lambda a, b, c: np.maximum(a, b)),
        ("max.f32 %o, %a, %b, %c;", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
        ("neg.f32 %o, %a;", lambda a, b, c: -a),
        ("abs.f32 %o, %a;", lambda a, b, c: np.abs(a)),
        ("div.rn.f32 %o, %a, %b;", lambda a, b, c: a / b),
        ("sqrt.rn.f32 %o, %a;", lambda a, b, c: np.sqrt(a)),
        ("cvt.rzi.s32.f32 %r9, %a; cvt.rn.f32.s32 %o, %r9;", lambda a, b, c: np.trunc(a)),
        ("cvt.rni.f32.f32 %o, %a;", lambda a, b, c: np.rint(a)),
        ("setp.gtu.f32 %p1, %a, %b; selp.f32 %o, %a, %b, %p1;", lambda a, b, c: np.maximum(a, b)),
        (
            "mov.b64 %d5, {%a, %b}; fma.rn.f32x2 %d5, %d5, %d5, %d5; mov.b64 {%r5, %o}, %d5;",
            lambda a, b, c: fma(b, b, b),
        ),
        ("mov.b64 %d5, {%a, %b}; mul.rn.f32x2 %d5, %d5, %d5; mov.b64 {%o, %r5}, %d5;", lambda a, b, c: a * a),
    ],
)
def test_float(text, formula):
    with np.errstate(invalid="ignore"):
        expected = formula(*F32).astype(np.float32)
    result = elementwise(text, F32, np.float32)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(
    "name, formula", [("lt", np.less), ("neu", np.not_equal), ("eq", np.equal), ("ge", np.greater_equal)]
)
def test_comparison_of_16_bit_floats(kind, name, formula):
    """Values, infinities, zeros of both signs and NaN; as bits, negative numbers would come out in the wrong order."""
    edges = np.array([0.0, -0.0, 1.0, -1.0, -2.0, np.inf, -np.inf, np.nan], np.float32)
    a, b = np.repeat(edges, 32), np.tile(edges, 32)
    bits = [x.astype(np.float16).view(np.uint16) if kind == "f16" else (x.view(np.uint32) >> 16) for x in (a, b)]
    text = f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %o, 1, 0, %p1;"
    result = elementwise(text, [x.astype(np.uint16) for x in bits], np.uint32)
    np.testing.assert_array_equal(result, formula(a, b))


@pytest.mark.parametrize("kind", ["ftz.f16", "f16x2", "bf16x2"])
def test_comparison_that_is_not_offered(kind):
    with pytest.raises(UnsupportedInstruction, match="setp"):
        elementwise(f"setp.lt.{kind} %p1, %a, %b; mov.b32 %o, 0;", [U32[0], U32[1]], np.uint32)


@pytest.mark.parametrize(
    "text, formula, bound",
    [
        ("ex2.approx.f32 %o, %a;", np.exp2, 2**-22),
        ("ex2.approx.ftz.f32 %o, %a;", np.exp2, 2**-22),
        ("lg2.approx.f32 %o, %a;", np.log2, 2**-22),
        ("rcp.approx.ftz.f32 %o, %a;", lambda x: 1 / x, 2**-23),
        ("rsqrt.approx.f32 %o, %a;", lambda x: 1 / np.sqrt(x), 2**-22),
        ("tanh.approx.f32 %o, %a;", np.tanh, 2**-11),
    ],
)
def test_approximate(text, formula, bound):
    """Within the largest relative error that PTX documents; lg2 below 2 by its absolute error."""
    values = np.abs(F32[0]) + np.float32(0.01)
    result, exact = elementwise(text, [values], np.float32), formula(values.astype(np.float64))
    assert (np.abs(result - exact) <= bound * np.maximum(np.abs(exact), 1 if "lg2" in text else 0)).all()


def test_special_values():
    result = elementwise("ex2.approx.ftz.f32 %o, %a;", [SPECIAL], np.float32)[:5]
    np.testing.assert_array_equal(result, np.array([1, 1, np.inf, 0, np.nan], np.float32))
    result = elementwise("rcp.approx.ftz.f32 %o, %a;", [SPECIAL], np.float32)[:7]
    np.testing.assert_array_equal(result, np.array([np.inf, -np.inf, 0, -0.0, np.nan, np.inf, -np.inf], np.float32))
    assert elementwise("lg2.approx.ftz.f32 %o, %a;", [SPECIAL], np.float32)[0] == -np.inf
    # fmax drops a NaN, max.NaN keeps it; a subnormal survives without ftz only.
    zeros = np.zeros(N, np.float32)
    assert elementwise("max.f32 %o, %a, %b;", [SPECIAL, zeros], np.float32)[4] == 0
    assert np.isnan(elementwise("max.NaN.f32 %o, %a, %b;", [SPECIAL, zeros], np.float32)[4])
    assert elementwise("add.f32 %o, %a, %b;", [SPECIAL, zeros], np.float32)[5] == np.float32(1e-40)
    assert elementwise("add.ftz.f32 %o, %a, %b;", [SPECIAL, zeros], np.float32)[5] == 0
    assert elementwise("cvt.rzi.s32.f32 %o, %a;", [SPECIAL], np.int32)[[2, 3, 4, 7]].tolist() == [
        2**31 - 1, -(2**31), 0, 2**31 - 1,
    ]  # fmt: skip
    equal = elementwise("setp.eq.f32 %p1, %a, %a; selp.u32 %o, 1, 0, %p1;", [SPECIAL], np.uint32)
    np.testing.assert_array_equal(equal[:5], [1, 1, 1, 1, 0])


def directed(exact: Fraction, rounding: str) -> np.float32:
    """The float32 at or next to an exact value on the side that PTX names."""
    near = np.float32(float(exact))
    if rounding == "rz":
        rounding = "rm" if exact > 0 else "rp"
    if rounding == "rm" and Fraction(float(near)) > exact:
        return np.nextafter(near, np.float32(-np.inf))
    if rounding == "rp" and Fraction(float(near)) < exact:
        return np.nextafter(near, np.float32(np.inf))
    return near


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "fma"])
def test_directed_rounding(name, rounding):
    """To the last bit, whatever the distance of the terms' exponents."""
    a, b, c = (x * np.float32(2.0) ** RNG.integers(-45, 45, N).astype(np.float32) for x in F32)
    formula = {"add": lambda a, b, c: a + b, "sub": lambda a, b, c: a - b, "fma": lambda a, b, c: a * b + c}[name]
    exact = [formula(*(Fraction(float(x)) for x in row)) for row in zip(a, b, c, strict=True)]
    operands = "%a, %b, %c" if name == "fma" else "%a, %b"
    result = elementwise(f"{name}.{rounding}.f32 %o, {operands};", [a, b, c], np.float32)
    np.testing.assert_array_equal(result, np.array([directed(x, rounding) for x in exact]))


def test_directed_rounding_of_special_values():
    huge, inf = np.float32(3.4028235e38), np.float32(np.inf)
    a = np.array([huge, -huge, inf, inf, 0, -0.0, 1.5, -0.0] * 4, np.float32)
    b = np.array([huge, -huge, 1, -inf, 0, 0, -1.5, -0.0] * 4, np.float32)
    expected = {
        "rz": [huge, -huge, inf, np.nan, 0.0, 0.0, 0.0, -0.0],
        "rm": [huge, -inf, inf, np.nan, 0.0, -0.0, -0.0, -0.0],
        "rp": [inf, -huge, inf, np.nan, 0.0, 0.0, 0.0, -0.0],
    }
    for rounding, values in expected.items():
        result = elementwise(f"add.{rounding}.f32 %o, %a, %b;", [a, b], np.float32)[:8]
        np.testing.assert_array_equal(result, np.array(values, np.float32))
        np.testing.assert_array_equal(np.signbit(result[4:]), np.signbit(values[4:]))


def test_saturation():
    result = elementwise("cvt.sat.f32.f32 %o, %a;", [SPECIAL], np.float32)
    np.testing.assert_array_equal(result, np.clip(np.nan_to_num(SPECIAL, nan=0.0), 0, 1))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_add_of_a_half(kind):
    half = bf16(F32[0]) if kind == "bf16" else F32[0].astype(np.float16).view(np.uint16)
    wide = (half.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else half.view(np.float16).astype("f4")
    result = elementwise(f"add.rn.f32.{kind} %o, %a, %b;", [half, F32[1]], np.float32)
    np.testing.assert_array_equal(result, wide + F32[1])


def test_halves():
    packed = elementwise("cvt.rn.bf16x2.f32 %o, %a, %b;", F32, np.uint32)
    np.testing.assert_array_equal(packed >> 16, bf16(F32[0]))
    np.testing.assert_array_equal(packed & 0xFFFF, bf16(F32[1]))
    packed = elementwise("cvt.rn.f16x2.f32 %o, %a, %b;", F32, np.uint32)
    np.testing.assert_array_equal((packed & 0xFFFF).astype(np.uint16).view(np.float16), F32[1].astype(np.float16))
    one = elementwise("cvt.rn.bf16.f32 %h1, %a; cvt.f32.bf16 %o, %h1;", F32, np.float32)
    np.testing.assert_array_equal(one.view(np.uint32) >> 16, bf16(F32[0]))
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF] * 8, np.uint32).view(np.float32)
    result = elementwise("cvt.rn.bf16.f32 %o, %a;", [ties], np.uint16)
    np.testing.assert_array_equal(result[:4], [0x3F80, 0x3F82, 0x3F81, 0x3F80])
    half = [a.astype(np.float16) for a in F32]
    result = elementwise("fma.rn.f16 %o, %a, %b, %c;", half, np.float16)
    a, b, c = (h.astype(np.float64) for h in half)
    np.testing.assert_array_equal(result, (a * b + c).astype(np.float16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fma_with_relu(kind):
    halves = [bf16(a) if kind == "bf16" else a.astype(np.float16).view(np.uint16) for a in F32]
    a, b, c = ((h.astype(np.uint32) << 16).view("f4") if kind == "bf16" else h.view("f2").astype("f4") for h in halves)
    pairs = [h.astype(np.uint32) << 16 | h[::-1] for h in halves]
    result = elementwise(f"fma.rn.relu.{kind}x2 %o, %a, %b, %c;", pairs, np.uint32)
    exact = np.maximum(a.astype(np.float64) * b + c, 0)
    expected = bf16(exact.astype("f4")) if kind == "bf16" else exact.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(result >> 16, expected)
    np.testing.assert_array_equal((result & 0xFFFF)[::-1], expected)


@pytest.mark.parametrize("kind, largest", [("e4m3x2", 448), ("e5m2x2", 57344)])
def test_fp8(kind, largest):
    values = np.concatenate([F32[0], [0, 1e9, -1e9, 1e-9]]).astype(np.float32)[-N:]
    codes = elementwise(f"cvt.rn.satfinite.{kind}.f32 %o, %a, %a;", [values], np.uint16)
    wide = elementwise(f"cvt.rn.f16x2.{kind} %o, %a;", [codes], np.uint32)
    result = (wide & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)
    step = 2.0 ** -(4 if kind == "e4m3x2" else 3)
    inside = np.clip(values, -largest, largest)
    assert (np.abs(result - inside) <= np.maximum(np.abs(inside) * step, 2.0**-10)).all()
    assert result[-3] == largest and result[-2] == -largest


UNKNOWN = [
    "add.rz.f64 %o, %a, %b;", "div.rz.f32 %o, %a, %b;", "add.rz.f32x2 %o, %a, %b;",
    "add.sat.s32 %o, %a, %b;", "add.cc.u32 %o, %a, %b;", "mad.hi.s64 %o, %a, %b, %a;",
    "mad.lo.cc.u32 %o, %a, %b, %a;", "min.xorsign.abs.f32 %o, %a, %b;", "max.relu.u16x2 %o, %a, %b;",
    "nosuch.b32 %o, %a;",
    "fma.rn.sat.f32 %o, %a, %b, %a;", "fma.rn.relu.f32 %o, %a, %b, %a;", "cvt.rn.sat.f32.f32 %o, %a;",
    "ex2.approx.ftz.f16x2 %o, %a;",
    "ld.global.b32.nosuch %o, [%d1];", "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%o, %r3}, [%r1];",
    "shfl.sync.bfly.b64 %o, %a, 1, 31, -1;", "wgmma.fence.sync.aligned;", "mov.u32 %o, %clock;",
    "atom.global.add.noftz.f16x2 %o, [%d1], %a;", "barrier.cta.red.popc.u32 %o, 0, %p1;",
]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_raises(text):
    with pytest.raises(UnsupportedInstruction, match=re.escape(text.rstrip(";"))):
        elementwise(text, F32, np.float32)
