"""The instructions that the kernels are written in, one function each, as PTX.

Registers are DSL scalars (Int32 for packed pairs, Float32), so a fragment is a Python list of scalars and
indexing it costs nothing. Shared addresses are 32-bit, global ones 64-bit, both in bytes.
Source: NVIDIA, PTX ISA 8.7, sections on mma, ldmatrix, cp.async and ex2.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

PTX_DTYPE = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
SIGNALLING_NAN = 0x7F812345


def _asm(result: ir.Type | None, operands: list, text: str, constraints: str, *, volatile: bool, loc=None, ip=None):
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=volatile,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def _unpack(struct: ir.Value, element: ir.Type, count: int, wrap: type, loc=None, ip=None) -> list:
    return [wrap(llvm.extractvalue(element, struct, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def cp_async_16(
    shared: Int32, glob: Int64, size: Int32, shared_offset: int, glob_offset: int, once: bool, *, loc=None, ip=None
) -> None:
    """Copies 16 bytes, glob + glob_offset to shared + shared_offset; size 0 (not 16) reads nothing and writes zeros.
    once: it won't be read again soon, so that L2 may drop it before all else."""
    places = f"[$0+{shared_offset}], [$1+{glob_offset}], 16, $2"
    text = f"cp.async.cg.shared.global.L2::128B {places};"
    if once:
        policy = ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        text = f"{{ {policy} cp.async.cg.shared.global.L2::cache_hint.L2::128B {places}, policy; }}"
    operands = [Int32(shared), Int64(glob), Int32(size)]
    values = [operand.ir_value(loc=loc, ip=ip) for operand in operands]
    _asm(None, values, text, "r,l,r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def ldmatrix_x4(
    shared: Int32, flip: int = 0, offset: int = 0, *, transpose: bool = False, loc=None, ip=None
) -> list[Int32]:
    """Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i // 8.

    The address is (shared ^ flip) + offset. The flip stands inside the instruction's text so that no register holds
    its result from one loop iteration to the next.
    """
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    modifier = ".trans" if transpose else ""
    load = f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0, $1, $2, $3}}, "
    if flip:
        text = f"{{ .reg .b32 flipped; xor.b32 flipped, $4, {flip}; {load}[flipped+{offset}]; }}"
    else:
        text = f"{load}[$4+{offset}];"
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    loaded = _asm(struct, [operand], text, "=r,=r,=r,=r,r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.i32(), 4, Int32, loc, ip)


@dsl_user_op
def mma_m16n8k16(
    a: Sequence[Int32], b: Sequence[Int32], c: Sequence[Float32], dtype: str, *, loc=None, ip=None
) -> list[Float32]:
    """a (16 x 16) @ b (16 x 8) + c in float32; dtype is "bf16" or "f16"."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (*a, *b)]
    operands += [Float32(x).ir_value(loc=loc, ip=ip) for x in c]
    product = _asm(
        struct,
        operands,
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        volatile=False,
        loc=loc,
        ip=ip,
    )
    return _unpack(product, T.f32(), 4, Float32, loc, ip)


@dsl_user_op
def cp_async_arrive(shared: Int32, *, loc=None, ip=None) -> None:
    """An arrival at the mbarrier once the lane's copies have landed; it raises what the phase waits for by itself."""
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    _asm(None, [operand], "cp.async.mbarrier.arrive.shared.b64 [$0];", "r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def pack_pair(low: Float32, high: Float32, dtype: str, *, loc=None, ip=None) -> Int32:
    """Two float32 rounded to nearest even, low in bits 0-15."""
    operands = [Float32(high).ir_value(loc=loc, ip=ip), Float32(low).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operands, f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", "=r,f,f", volatile=False, loc=loc, ip=ip))


def _unary(instruction: str):
    @dsl_user_op
    def apply(x: Float32, *, loc=None, ip=None) -> Float32:
        operand = Float32(x).ir_value(loc=loc, ip=ip)
        return Float32(_asm(T.f32(), [operand], f"{instruction} $0, $1;", "=f,f", volatile=False, loc=loc, ip=ip))

    return apply


absolute = _unary("abs.f32")
exp2 = _unary("ex2.approx.ftz.f32")
log2 = _unary("lg2.approx.ftz.f32")
reciprocal = _unary("rcp.approx.ftz.f32")


@dsl_user_op
def mbarrier_arrive_after(
    shared: Int32, results: Sequence[Float32], enabled: Int32 | None, *, loc=None, ip=None
) -> None:
    """Counts one arrival of the warp at the mbarrier, when the results are there.

    An arrival may overtake a read of shared memory that was issued before it, so it is made to depend on what the reads
    went into: it happens unless a result has the bits of a signalling NaN, which no arithmetic gives.
    enabled: 1 in the one lane that arrives; None lets the chip elect it, from sm_90 on.
    """
    operands = [Int32(shared).ir_value(loc=loc, ip=ip)] + [Float32(x).ir_value(loc=loc, ip=ip) for x in results]
    constraints = "r" + ",f" * len(results)
    lane = "elect.sync _|p, 0xffffffff;"
    if enabled is not None:
        lane = f"setp.ne.b32 p, ${len(operands)}, 0;"
        operands.append(Int32(enabled).ir_value(loc=loc, ip=ip))
        constraints += ",r"
    there = "".join(f"mov.b32 x, ${i + 1}; setp.ne.and.b32 p, x, {SIGNALLING_NAN}, p; " for i in range(len(results)))
    text = f"{{ .reg .pred p; .reg .b32 x; {lane} {there}@p mbarrier.arrive.shared.b64 _, [$0]; }}"
    _asm(None, operands, text, constraints, volatile=True, loc=loc, ip=ip)


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(_asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", volatile=False, loc=loc, ip=ip))


@dsl_user_op
def thread_anew(*, loc=None, ip=None) -> Int32:
    """The thread in its block, read where it stands: nothing that is computed from it holds a register before."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %tid.x;", "=r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def computed_here(address: Int64, *, loc=None, ip=None) -> Int64:
    """The same; what it follows from isn't left for after the next wait."""
    operand = Int64(address).ir_value(loc=loc, ip=ip)
    return Int64(_asm(T.i64(), [operand], "mov.b64 $0, $1;", "=l,l", volatile=True, loc=loc, ip=ip))


def lane_anew() -> Int32:
    """The lane in its warp, likewise."""
    return thread_anew() & 31


@dsl_user_op
def lane_apart(*, loc=None, ip=None) -> Int32:
    """The lane, in a way that ptxas doesn't hold the results of for both."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %laneid;", "=r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def store_shared_b32(shared: Int32, value: Int32, *, loc=None, ip=None) -> None:
    operands = [Int32(shared).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.shared.b32 [$0], $1;", "r,r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def load_shared_b32(shared: Int32, *, loc=None, ip=None) -> Int32:
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    return Int32(_asm(T.i32(), [operand], "ld.shared.b32 $0, [$1];", "=r,r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def load_shared_v4(shared: Int32, *, loc=None, ip=None) -> list[Int32]:
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = _asm(struct, [operand], text, "=r,=r,=r,=r,r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.i32(), 4, Int32, loc, ip)


@dsl_user_op
def store_global_v4(glob: Int64, values: Sequence[Int32], *, loc=None, ip=None) -> None:
    operands = [Int64(glob).ir_value(loc=loc, ip=ip)] + [Int32(v).ir_value(loc=loc, ip=ip) for v in values]
    _asm(None, operands, "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def load_global_b32_if(glob: Int64, enabled: Int32, *, loc=None, ip=None) -> Int32:
    """0, and nothing read, where enabled is 0."""
    operands = [Int64(glob).ir_value(loc=loc, ip=ip), Int32(enabled).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }"
    return Int32(_asm(T.i32(), operands, text, "=&r,l,r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def load_global_v4_if(glob: Int64, enabled: Int32, *, loc=None, ip=None) -> list[Int32]:
    """16 bytes; zeros, and nothing read, where enabled is 0."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    operands = [Int64(glob).ir_value(loc=loc, ip=ip), Int32(enabled).ir_value(loc=loc, ip=ip)]
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    text = f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros} @p ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4]; }}"
    loaded = _asm(struct, operands, text, "=&r,=&r,=&r,=&r,l,r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.i32(), 4, Int32, loc, ip)


@dsl_user_op
def prefetch_l2(glob: Int64, *, loc=None, ip=None) -> None:
    operand = Int64(glob).ir_value(loc=loc, ip=ip)
    _asm(None, [operand], "prefetch.global.L2 [$0];", "l", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def load_global_b32(glob: Int64, offset: int = 0, *, loc=None, ip=None) -> Int32:
    operand = Int64(glob).ir_value(loc=loc, ip=ip)
    text = f"ld.global.b32 $0, [$1+{offset}];"
    return Int32(_asm(T.i32(), [operand], text, "=r,l", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def load_global_v4_f32_if(glob: Int64, enabled: Int32, *, loc=None, ip=None) -> list[Float32]:
    """Four float32; zeros, and nothing read, where enabled is 0."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    operands = [Int64(glob).ir_value(loc=loc, ip=ip), Int32(enabled).ir_value(loc=loc, ip=ip)]
    zeros = " ".join(f"mov.f32 ${i}, 0f00000000;" for i in range(4))
    text = f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros} @p ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4]; }}"
    loaded = _asm(struct, operands, text, "=&f,=&f,=&f,=&f,l,r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.f32(), 4, Float32, loc, ip)


@dsl_user_op
def load_fresh_v4_f32(glob: Int64, *, loc=None, ip=None) -> list[Float32]:
    """Four float32 that another block of this launch has written; the caller has seen that it has."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    operand = Int64(glob).ir_value(loc=loc, ip=ip)
    text = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = _asm(struct, [operand], text, "=f,=f,=f,=f,l", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.f32(), 4, Float32, loc, ip)


@dsl_user_op
def load_fresh_f32(glob: Int64, *, loc=None, ip=None) -> Float32:
    """A float32 that another block of this launch has written; the caller has seen that it has."""
    operand = Int64(glob).ir_value(loc=loc, ip=ip)
    text = "ld.relaxed.gpu.global.b32 $0, [$1];"
    return Float32(_asm(T.f32(), [operand], text, "=f,l", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def take_ticket(glob: Int64, last: Int32, *, loc=None, ip=None) -> Int32:
    """Counts the uint32 at glob up, from `last` on to 0 again; returns what it was. Who takes a later ticket sees what
    was written before this one."""
    operands = [Int64(glob).ir_value(loc=loc, ip=ip), Int32(last).ir_value(loc=loc, ip=ip)]
    text = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
    return Int32(_asm(T.i32(), operands, text, "=r,l,r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def load_shared_v2(shared: Int32, offset: int = 0, *, loc=None, ip=None) -> list[Int32]:
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    text = f"ld.shared.v2.b32 {{$0, $1}}, [$2+{offset}];"
    loaded = _asm(struct, [operand], text, "=r,=r,r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.i32(), 2, Int32, loc, ip)


@dsl_user_op
def load_shared_f32(shared: Int32, count: int, *, loc=None, ip=None) -> list[Float32]:
    """`count` float32 side by side, 2 or 4."""
    struct = llvm.StructType.get_literal([T.f32()] * count)
    operand = Int32(shared).ir_value(loc=loc, ip=ip)
    names = ", ".join(f"${i}" for i in range(count))
    text = f"ld.shared.v{count}.b32 {{{names}}}, [${count}];"
    loaded = _asm(struct, [operand], text, "=f," * count + "r", volatile=True, loc=loc, ip=ip)
    return _unpack(loaded, T.f32(), count, Float32, loc, ip)


@dsl_user_op
def store_shared_v4(shared: Int32, values: Sequence[Int32], *, loc=None, ip=None) -> None:
    operands = [Int32(shared).ir_value(loc=loc, ip=ip)] + [Int32(v).ir_value(loc=loc, ip=ip) for v in values]
    _asm(None, operands, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def store_shared_f32(shared: Int32, values: Sequence[Float32], *, loc=None, ip=None) -> None:
    """1, 2 or 4 float32 side by side."""
    operands = [Int32(shared).ir_value(loc=loc, ip=ip)] + [Float32(v).ir_value(loc=loc, ip=ip) for v in values]
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    kind, group = (f".v{len(values)}", f"{{{names}}}") if len(values) > 1 else ("", names)
    _asm(None, operands, f"st.shared{kind}.b32 [$0], {group};", "r" + ",f" * len(values), volatile=True, loc=loc, ip=ip)


@dsl_user_op
def store_global_v2(glob: Int64, values: Sequence[Int32], *, loc=None, ip=None) -> None:
    operands = [Int64(glob).ir_value(loc=loc, ip=ip)] + [Int32(v).ir_value(loc=loc, ip=ip) for v in values]
    _asm(None, operands, "st.global.v2.b32 [$0], {$1, $2};", "l,r,r", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def store_global_v4_f32(glob: Int64, values: Sequence[Float32], *, loc=None, ip=None) -> None:
    operands = [Int64(glob).ir_value(loc=loc, ip=ip)] + [Float32(v).ir_value(loc=loc, ip=ip) for v in values]
    _asm(None, operands, "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", volatile=True, loc=loc, ip=ip)


@dsl_user_op
def warp_sum(value: Int32, *, loc=None, ip=None) -> Int32:
    """Of all lanes of a warp, in each of them."""
    operand = Int32(value).ir_value(loc=loc, ip=ip)
    text = "redux.sync.add.s32 $0, $1, 0xffffffff;"
    return Int32(_asm(T.i32(), [operand], text, "=r,r", volatile=True, loc=loc, ip=ip))


@dsl_user_op
def byte_permute(a: Int32, b: Int32, selector: int, *, loc=None, ip=None) -> Int32:
    """Each nibble of the selector, from the lowest, names a byte of the result: 0 to 3 of a, 4 to 7 of b."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    text = f"prmt.b32 $0, $1, $2, {selector};"
    return Int32(_asm(T.i32(), operands, text, "=r,r,r", volatile=False, loc=loc, ip=ip))


@dsl_user_op
def subtract_bits(a: Int32, b: Int32, borrow: Int32, *, loc=None, ip=None) -> Int32:
    """In each place whether b < a, or b <= a where `borrow` is set: the borrow of b - a, handed on bit by bit."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (borrow, b, a)]
    text = "lop3.b32 $0, $1, $2, $3, 0xb2;"
    return Int32(_asm(T.i32(), operands, text, "=r,r,r,r", volatile=False, loc=loc, ip=ip))


@dsl_user_op
def rotate_left(a: Int32, places: int, *, loc=None, ip=None) -> Int32:
    """The bits that leave at the top come back at the bottom."""
    operand = Int32(a).ir_value(loc=loc, ip=ip)
    text = f"shf.l.wrap.b32 $0, $1, $1, {places};"
    return Int32(_asm(T.i32(), [operand], text, "=r,r", volatile=False, loc=loc, ip=ip))


@dsl_user_op
def fma_relu(a: Int32, factor: int, c: Int32, dtype: str, *, loc=None, ip=None) -> Int32:
    """max(a * factor + c, 0) of packed pairs; factor: the pair's 32 bits."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (a, c)]
    text = f"{{ .reg .b32 factor; mov.b32 factor, {factor}; fma.rn.relu.{dtype}x2 $0, $1, factor, $2; }}"
    return Int32(_asm(T.i32(), operands, text, "=r,r,r", volatile=False, loc=loc, ip=ip))


@dsl_user_op
def multiply_wide(a: Int32, factor: int, *, loc=None, ip=None) -> tuple[Int32, Int32]:
    """(high, low) 32 bits of the product of two unsigned 32-bit numbers."""
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    operand = Int32(a).ir_value(loc=loc, ip=ip)
    text = f"{{ .reg .b64 product; mul.wide.u32 product, $2, {factor}; mov.b64 {{$0, $1}}, product; }}"
    low, high = _unpack(_asm(struct, [operand], text, "=r,=r,r", volatile=False, loc=loc, ip=ip), T.i32(), 2, Int32)
    return high, low


@dsl_user_op
def fp8_to_f16(packed: Int32, kind: str, *, loc=None, ip=None) -> list[Int32]:
    """Four fp8 values (kind "e4m3" or "e5m2") -> two packed pairs of f16, exactly; the lowest bytes first."""
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    operand = Int32(packed).ir_value(loc=loc, ip=ip)
    convert = f"cvt.rn.f16x2.{kind}x2"
    text = f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, $2; {convert} $0, low; {convert} $1, high; }}"
    pairs = _asm(struct, [operand], text, "=r,=r,r", volatile=False, loc=loc, ip=ip)
    return _unpack(pairs, T.i32(), 2, Int32, loc, ip)


@dsl_user_op
def infinite_to_nan(pair: Int32, *, loc=None, ip=None) -> Int32:
    """A packed pair of f16, of which what isn't finite becomes NaN."""
    operands = [Int32(pair).ir_value(loc=loc, ip=ip), Int32(0).ir_value(loc=loc, ip=ip)]
    text = "fma.rn.f16x2 $0, $1, $2, $1;"
    return Int32(_asm(T.i32(), operands, text, "=r,r,r", volatile=False, loc=loc, ip=ip))
