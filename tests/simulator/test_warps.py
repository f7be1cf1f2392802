"""What warps do together: shuffles, votes, divergence, barriers, matrix fragments."""

import numpy as np
import pytest
from ptx_harness import aligned, elementwise, kernel_text, run

from flash_attn_sm120.simulator import SimulationError, machine
from flash_attn_sm120.simulator.instructions_conversion import fp8_values

LANES = np.arange(32, dtype=np.uint32)
IN = np.concatenate([LANES + 100, LANES * 3]).astype(np.uint32)


@pytest.mark.parametrize(
    "text, source",
    [
        ("shfl.sync.bfly.b32 %o, %a, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.idx.b32 %o, %a, 7, 31, -1;", LANES * 0 + 7),
        ("shfl.sync.up.b32 %o, %a, 2, 0, -1;", np.where(LANES >= 2, LANES - 2, LANES)),
        ("shfl.sync.down.b32 %o, %a, 3, 31, -1;", np.where(LANES < 29, LANES + 3, LANES)),
        ("shfl.sync.idx.b32 %o, %a, 1, 0x1c1f, -1;", LANES // 4 * 4 + 1),
        ("shfl.sync.bfly.b32 %o, %a, 1, 0x1c1f, -1;", LANES ^ 1),
    ],
)
def test_shuffle(text, source):
    result = elementwise(text, [IN], np.uint32)
    np.testing.assert_array_equal(result, np.concatenate([IN[:32][source], IN[32:][source]]))


def test_votes():
    setup = "setp.gt.u32 %p1, %a, 50;"
    ballot = elementwise("vote.sync.ballot.b32 %o, %p1, -1;", [IN], np.uint32, setup)
    bits = sum(1 << i for i in range(32) if i * 3 > 50)
    np.testing.assert_array_equal(ballot, [0xFFFFFFFF] * 32 + [bits] * 32)
    every = elementwise("vote.sync.all.pred %p2, %p1, -1; selp.u32 %o, 1, 0, %p2;", [IN], np.uint32, setup)
    np.testing.assert_array_equal(every, [1] * 32 + [0] * 32)
    chosen = elementwise("elect.sync %r9|%p2, -1; selp.u32 %o, 1, 0, %p2;", [IN], np.uint32)
    np.testing.assert_array_equal(chosen, ([1] + [0] * 31) * 2)
    total = elementwise("redux.sync.add.u32 %o, %a, -1;", [IN], np.uint32)
    np.testing.assert_array_equal(total, [IN[:32].sum()] * 32 + [IN[32:].sum()] * 32)


def test_divergent_loop_meets_again():
    """Each lane loops tid times; then a shuffle needs all of them."""
    body = """
    mov.b32 %r3, 0; mov.b32 %r4, %r1;
    LOOP: setp.eq.u32 %p1, %r4, 0; @%p1 bra DONE;
    add.u32 %r3, %r3, %r4; sub.u32 %r4, %r4, 1; bra LOOP;
    DONE: shfl.sync.bfly.b32 %o, %r3, 1, 31, -1;
    """
    result = elementwise(body, [IN], np.uint32)
    sums = LANES * (LANES + 1) // 2
    np.testing.assert_array_equal(result, np.tile(sums[LANES ^ 1], 2))


def test_divergent_warp_is_reported():
    body = "setp.lt.u32 %p1, %r1, 3; @%p1 bra SKIP; shfl.sync.bfly.b32 %o, %a, 1, 31, -1; SKIP: "
    with pytest.raises(SimulationError, match="divergent warp"):
        elementwise(body, [IN], np.uint32)


def test_local_memory():
    body = """
    add.u32 %r5, %r1, 1; and.b32 %r5, %r5, 1; shl.b32 %r6, %r5, 2; cvt.u64.u32 %d5, %r6; mov.b64 %d6, depot;
    add.s64 %d7, %d6, %d5; st.local.b32 [%d6], 11; st.local.b32 [%d6+4], 22; ld.local.b32 %o, [%d7];
    """
    result = elementwise(body, [IN], np.uint32, ".local .align 8 .b8 depot[16];")
    np.testing.assert_array_equal(result, np.where(np.arange(64) % 2 == 0, 22, 11))


def fragment_kernel(body: str, a: np.ndarray, b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One warp: a and b (rows of 16-byte multiples) are copied to shared memory, `body` leaves c in %f0..%f3."""
    copies = []
    for i, array in enumerate((a, b)):
        copies.append(
            f"ld.param.b64 %d1, [p{i}]; mov.b32 %r2, tile{i}; mov.u32 %r3, %tid.x; shl.b32 %r3, %r3, 4;"
            f"setp.lt.u32 %p1, %r3, {array.nbytes}; cvt.u64.u32 %d2, %r3; add.s64 %d1, %d1, %d2; add.u32 %r2, %r2, %r3;"
            f"@%p1 cp.async.cg.shared.global [%r2], [%d1], 16;"
        )
    body = (
        " ".join(copies)
        + "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
        + body
        + """
    ld.param.b64 %d1, [p2]; mov.u32 %r3, %tid.x; shr.u32 %r4, %r3, 2; and.b32 %r5, %r3, 3;
    mad.wide.u32 %d1, %r4, 32, %d1; mad.wide.u32 %d1, %r5, 8, %d1;
    st.global.v2.b32 [%d1], {%f0, %f1}; st.global.v2.b32 [%d1+256], {%f2, %f3};
    """
    )
    head = ".shared .align 128 .b8 tile0[1024]; .shared .align 128 .b8 tile1[1024];"
    out = aligned(128, np.float32)
    arrays = {}
    for name, array in (("a", a), ("b", b)):
        arrays[name] = aligned(array.size, array.dtype)
        arrays[name][:] = array.ravel()
    run(kernel_text(body, 3, ".reg .b32 %f<8>;", head), arrays | {"out": out})
    return out.reshape(16, 8)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_product(kind, transposed):
    """A (16, 16) by ldmatrix.x4; B as (n, k) by ldmatrix.x2 or as (k, n) by ldmatrix.x2.trans."""
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (8, 16)))

    def bits(x):
        return x.astype(np.float16).view(np.uint16) if kind == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)

    stored = np.ascontiguousarray(b.T if transposed else b)
    row = (
        "and.b32 %r5, %r3, 15; shl.b32 %r5, %r5, 4;"
        if transposed
        else (
            "and.b32 %r5, %r3, 7; shl.b32 %r5, %r5, 5; and.b32 %r6, %r3, 8; shl.b32 %r6, %r6, 1; add.u32 %r5, %r5, %r6;"
        )
    )
    trans = ".trans" if transposed else ""
    body = f"""
    mov.u32 %r3, %tid.x; and.b32 %r4, %r3, 15; shl.b32 %r4, %r4, 5; shr.u32 %r6, %r3, 4; shl.b32 %r6, %r6, 4;
    mov.b32 %r7, tile0; add.u32 %r7, %r7, %r4; add.u32 %r7, %r7, %r6;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r7];
    {row} mov.b32 %r8, tile1; add.u32 %r8, %r8, %r5;
    ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r14, %r15}}, [%r8];
    mov.b32 %f4, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f0, %f1, %f2, %f3}}, {{%r10, %r11, %r12, %r13}},
        {{%r14, %r15}}, {{%f4, %f4, %f4, %f4}};
    """
    result = fragment_kernel(body, bits(a), bits(stored), (16, 8))
    np.testing.assert_array_equal(result, a @ b.T + 1)


def test_fp8_product():
    """m16n8k32: A and B as (rows, 32) bytes of e4m3, both by ldmatrix."""
    rng = np.random.default_rng(4)
    table = fp8_values("e4m3x2")
    a, b = rng.integers(0, 0x60, (16, 32)).astype(np.uint8), rng.integers(0x80, 0xE0, (8, 32)).astype(np.uint8)
    body = """
    mov.u32 %r3, %tid.x; and.b32 %r4, %r3, 15; shl.b32 %r4, %r4, 5; shr.u32 %r6, %r3, 4; shl.b32 %r6, %r6, 4;
    mov.b32 %r7, tile0; add.u32 %r7, %r7, %r4; add.u32 %r7, %r7, %r6;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7];
    and.b32 %r5, %r3, 7; shl.b32 %r5, %r5, 5; and.b32 %r6, %r3, 8; shl.b32 %r6, %r6, 1; add.u32 %r5, %r5, %r6;
    mov.b32 %r8, tile1; add.u32 %r8, %r8, %r5;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14, %r15}, [%r8];
    mov.b32 %f4, 0f00000000;
    mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13},
        {%r14, %r15}, {%f4, %f4, %f4, %f4};
    """
    result = fragment_kernel(body, a, b, (16, 8))
    np.testing.assert_allclose(result, table[a] @ table[b].T, rtol=1e-6)


PING = """
    mov.u32 %r1, %tid.x; mov.b32 %r2, buffer; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; shr.u32 %r9, %r1, 5;
    setp.eq.u32 %p1, %r9, 0; @%p1 bra PRODUCER;
    bar.sync 1, 64; ld.shared.b32 %r5, [%r4+-128];
    ld.param.b64 %d1, [p0]; mov.u32 %r6, %ctaid.x; mad.lo.u32 %r1, %r6, 32, %r1;
    mad.wide.u32 %d1, %r1, 4, %d1; st.global.b32 [%d1+-128], %r5; bra END;
    PRODUCER: st.shared.b32 [%r4], %r1; bar.arrive 1, 64;
    END:
"""
HEAD = ".shared .align 16 .b8 buffer[256];"


def test_named_barrier_orders_producer_and_consumer():
    out = aligned(96, np.uint32)
    run(kernel_text(PING, 1, head=HEAD), {"out": out}, block=(64, 1, 1), grid=(3, 1, 1))
    np.testing.assert_array_equal(out, np.tile(LANES, 3))


@pytest.mark.parametrize(
    "old, new, kind",
    [
        ("bar.sync 1, 64;", "", "read of unwritten memory"),
        ("bar.arrive 1, 64;", "", "deadlock"),
        ("bar.arrive 1, 64;", "bar.arrive 2, 64;", "deadlock"),
        (
            "st.shared.b32 [%r4], %r1; bar.arrive 1, 64;",
            "bar.arrive 1, 64; st.shared.b32 [%r4], %r1;",
            "unwritten|race",
        ),
        ("[%r4+-128]", "[%r4]", "unwritten"),
        ("[%r4+-128]", "[%r4+128]", "out-of-bounds shared"),
    ],
)
def test_named_barrier_faults(old, new, kind):
    assert old in PING
    with pytest.raises(SimulationError, match=kind):
        run(kernel_text(PING.replace(old, new), 1, head=HEAD), {"out": aligned(32, np.uint32)}, block=(64, 1, 1))


ROUNDS = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.b32 %r3, buffer; shl.b32 %r4, %r1, 2; add.u32 %r4, %r3, %r4;
    st.shared.b32 [%r4], %r1; mad.lo.u32 %r6, %r2, 3, 1;
    LOOP: bar.sync 0; sub.u32 %r6, %r6, 1; setp.ne.u32 %p1, %r6, 0; @%p1 bra LOOP;
    and.b32 %r7, %r1, 15; shl.b32 %r7, %r7, 4; add.u32 %r7, %r3, %r7;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r7];
    bar.sync 0; mov.b32 %r14, 5; st.shared.b32 [%r4], %r14;
    ld.param.b64 %d1, [p0]; mad.lo.u32 %r8, %r2, 64, %r1; mad.wide.u32 %d1, %r8, 4, %d1; st.global.b32 [%d1], %r13;
"""


def test_reads_of_many_granules_by_warps_of_different_clocks():
    """CTAs come to one instruction after different numbers of barriers; what each has read is its own clock's."""
    out = aligned(4 * 64, np.uint32)
    run(kernel_text(ROUNDS, 1, head=HEAD), {"out": out}, block=(64, 1, 1), grid=(4, 1, 1))
    np.testing.assert_array_equal(out, np.tile(np.arange(64) % 16 * 4 + 3, 4))
    unordered = ROUNDS.replace("bar.sync 0; mov.b32", "mov.b32")
    assert unordered != ROUNDS
    with pytest.raises(SimulationError, match="write not ordered after a read"):
        run(kernel_text(unordered, 1, head=HEAD), {"out": out}, block=(64, 1, 1), grid=(4, 1, 1))


def test_two_warps_write_the_same_place():
    body = "mov.b32 %r2, buffer; mov.u32 %r1, %tid.x; and.b32 %r1, %r1, 31; shl.b32 %r1, %r1, 2; " + (
        "add.u32 %r2, %r2, %r1; st.shared.b32 [%r2], %r1;"
    )
    with pytest.raises(SimulationError, match="two warps write the same place"):
        run(kernel_text(body, 0, head=HEAD), {}, block=(64, 1, 1))


def test_cp_async_shorter_than_its_size_fills_with_zeros():
    source, out = aligned(8, np.uint32), aligned(8, np.uint32)
    source[:] = np.arange(1, 9)
    body = """
    mov.b32 %r2, buffer; ld.param.b64 %d1, [p0]; mov.b32 %r3, 12; mov.b32 %r4, 0;
    mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
    cp.async.cg.shared.global [%r2], [%d1], 16, %r3; cp.async.ca.shared.global [%r2+16], [%d1+1000000], 16, %r4;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r2]; ld.shared.v4.b32 {%r14, %r15, %r16, %r17}, [%r2+16];
    ld.param.b64 %d2, [p1]; st.global.v4.b32 [%d2], {%r10, %r11, %r12, %r13};
    st.global.v4.b32 [%d2+16], {%r14, %r15, %r16, %r17};
    END:
    """
    run(kernel_text(body, 2, head=HEAD), {"source": source, "out": out})
    np.testing.assert_array_equal(out, [1, 2, 3, 0, 0, 0, 0, 0])


def test_atomics():
    out = aligned(4, np.uint32)
    body = "ld.param.b64 %d1, [p0]; mov.u32 %r1, %tid.x; atom.global.add.u32 %r2, [%d1], %r1; " + (
        "red.global.max.u32 [%d1+4], %r1; atom.global.cas.b32 %r3, [%d1+8], 0, 9;"
    )
    run(kernel_text(body, 1), {"out": out}, block=(64, 1, 1), grid=(2, 1, 1))
    np.testing.assert_array_equal(out[:3], [2 * sum(range(64)), 63, 9])


@pytest.mark.parametrize("access", ["st.global.b32 [%d1], %r1;", "st.global.b32 [%d1], 3; ld.global.b32 %r2, [%d1];"])
def test_ctas_that_share_what_they_write(access):
    body = "ld.param.b64 %d1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d1;" + access
    run(kernel_text(body, 1), {"out": aligned(32, np.uint32)})
    with pytest.raises(SimulationError, match="global-memory race"):
        run(kernel_text(body, 1), {"out": aligned(32, np.uint32)}, grid=(2, 1, 1))


def test_reading_what_another_cta_wrote():
    body = """
    ld.param.b64 %d1, [p0]; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 bra READ;
    st.global.b32 [%d1], 5; bra END;
    READ: ld.global.b32 %r2, [%d1];
    END:
    """
    with pytest.raises(SimulationError, match="read of what another CTA"):
        run(kernel_text(body, 1), {"out": aligned(32, np.uint32)}, grid=(2, 1, 1), block=(1, 1, 1))


def test_copies_that_arrive_on_an_mbarrier():
    """Warp 0 copies and arrives, warp 1 waits by parity and reads."""
    source, out = aligned(128, np.uint32), aligned(128, np.uint32)
    source[:] = np.arange(128)
    body = """
    mov.b32 %r2, buffer; mov.u32 %r1, %tid.x; and.b32 %r3, %r1, 31; shl.b32 %r3, %r3, 4; add.u32 %r4, %r2, %r3;
    mov.b32 %r7, signal; setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%r7], 32;
    READY: bar.sync 0; shr.u32 %r5, %r1, 5; cvt.u64.u32 %d3, %r3; setp.ne.u32 %p2, %r5, 0; @%p2 bra READ;
    ld.param.b64 %d1, [p0]; add.s64 %d1, %d1, %d3; cp.async.cg.shared.global [%r4], [%d1], 16;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r7]; bra END;
    READ: mbarrier.try_wait.parity.shared.b64 %p3, [%r7], 0; @!%p3 bra READ;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
    ld.param.b64 %d2, [p1]; add.s64 %d2, %d2, %d3; st.global.v4.b32 [%d2], {%r10, %r11, %r12, %r13};
    END:
    """
    head = ".shared .align 16 .b8 buffer[512]; .shared .align 8 .b64 signal;"
    run(kernel_text(body, 2, head=head), {"source": source, "out": out}, block=(64, 1, 1))
    np.testing.assert_array_equal(out, source)
    late = body.replace("READ: mbarrier.try_wait.parity.shared.b64 %p3, [%r7], 0; @!%p3 bra READ;", "READ: ")
    with pytest.raises(SimulationError, match=r"cp.async of warp 0|unwritten"):
        run(kernel_text(late, 2, head=head), {"source": source, "out": out}, block=(64, 1, 1))


def test_endless_loop(monkeypatch):
    monkeypatch.setattr(machine, "MAX_BLOCKS", 1000)
    with pytest.raises(SimulationError, match="livelock"):
        run(kernel_text("AGAIN: add.u32 %r1, %r1, 1; bra AGAIN;", 0), {})
