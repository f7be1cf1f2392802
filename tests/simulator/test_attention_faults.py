"""Faults planted in the PTX of the attention kernel, through the public function."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass")
from flash_attn_sm120 import flash_attn_func
from flash_attn_sm120.arguments import Arguments, Lengths, Numbers
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.simulator import SimulationError, load, simulate


def attention(edit=None, seqlen_q=200, seqlen_k=190, batch=1, tma=False):
    """Runs causal attention, head_dim 128, with edited PTX; repeated keys take the plain kernel."""
    q = torch.randn(batch, seqlen_q, 2, 128).bfloat16()
    k, v = (torch.randn(batch, seqlen_k, 1, 128).bfloat16().expand(-1, -1, 2, -1) for _ in range(2))
    if tma:
        k, v = k[:, :, :1], v[:, :, :1]
    with simulate(edit=edit):
        return flash_attn_func(q, k, v, causal=True, return_lse=True)


def fault(edit, **sizes):
    with pytest.raises(SimulationError) as caught:
        attention(edit, **sizes)
    return caught.value.report


def without(pattern: str, number: int):
    """An edit that removes one match of `pattern`."""

    def edit(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[number]
        return ptx[: match.start()] + ptx[match.end() :]

    return edit


def test_removed_barrier():
    """Matrix warps go on before the loading warp has made the mbarriers and thread 0 has written the tile's note."""
    report = fault(without(r"bar\.sync\s+0;", 0))
    assert report.kind in ("shared-memory race", "read of unwritten shared memory")
    assert report.cta is not None and report.warp is not None


def test_cp_async_that_nobody_waits_for():
    """The loading warp says that a tile is full when its copies are issued, not when they have landed."""
    arrive = r"cp\.async\.mbarrier\.arrive\.noinc\.shared(?:::cta)?\.b64\s+"
    report = fault(lambda ptx: re.sub(arrive, "mbarrier.arrive.shared.b64 _, ", ptx))
    assert report.kind in ("shared-memory race", "read of unwritten shared memory")
    assert report.ptx_text.startswith("ldmatrix") and report.warp is not None and report.lane is not None


def test_unpredicated_ragged_load():
    report = fault(lambda ptx: re.sub(r"(cp\.async\.cg[^;]*, 16), %r\d+;", r"\1;", ptx))
    assert report.kind == "out-of-bounds global access" and re.search("past the end of [qkv]", report.tensor)


def test_mask_off_by_one():
    """At the ragged edge a row too many is loaded: of the comparisons, those that the sizes of the copies follow."""
    wider = {"lt": "le", "gt": "ge"}

    def edit(ptx: str) -> str:
        sizes = set(re.findall(r"cp\.async\.cg[^;]*, 16, (%r\d+);", ptx))
        predicates = {found[1] for found in re.findall(r"(%r\d+), 16, 0, (%p\d+);", ptx) if found[0] in sizes}
        assert predicates
        for predicate in predicates:
            compared = rf"setp\.(lt|gt)\.s32(\s+{predicate},)"
            ptx, count = re.subn(compared, lambda match: f"setp.{wider[match[1]]}.s32{match[2]}", ptx)
            assert count == 1
        return ptx

    report = fault(edit)
    assert report.kind == "out-of-bounds global access" and re.search("past the end of [qkv]", report.tensor)


def test_row_stored_into_the_next_sequence():
    """Inside the tensor, but another thread block's row."""
    report = fault(lambda ptx: re.sub(r"setp\.ge\.s32", "setp.gt.s32", ptx), batch=2)
    assert report.kind in ("global-memory race", "out-of-bounds global access")


def test_unwritten_output_row():
    report = fault(without(r"st\.global\.v4[^;]*;", 0))
    assert report.kind == "unwritten output" and report.tensor.startswith("out[")


def test_unwritten_lse():
    report = fault(without(r"st\.global\.b32[^;]*;", 0))
    assert report.kind == "unwritten output" and report.tensor.startswith("lse[")


def test_divergent_barrier():
    skip = "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 q, t, 37; @q bra OVER; bar.sync 0; OVER: }"
    report = fault(lambda ptx: re.sub(r"bar\.sync\s+0;", skip, ptx, count=1))
    assert report.kind == "divergent barrier" and (report.warp, report.lane) == (1, 5)


@pytest.mark.parametrize("number", range(4))
def test_a_tile_is_never_given_back(number):
    """The loading warp waits for matrix warps that never say that they are done."""
    report = fault(without(r"@p mbarrier\.arrive\.shared\.b64 _, \[[^;]*;", number), tma=True, seqlen_k=400)
    assert report.kind == "deadlock"


def test_a_tile_is_read_before_it_is_full():
    def edit(ptx: str) -> str:
        """Every wait of the matrix warps passes at once."""
        return re.sub(r"(mbarrier\.try_wait\.parity[^;]*, )(%r\d+)(, %?\w+)?;", r"\g<1>1;", ptx)

    report = fault(edit, tma=True)
    assert report.kind in ("shared-memory race", "read of unwritten shared memory")


def paged(edit=None, page=1_000_000, rows=1, kv_dtype=torch.bfloat16, length=40, head_dim=128):
    """The second page of the first sequence, of `length` keys, has the number `page`, of 6."""
    torch.manual_seed(rows)
    q = torch.randn(2, rows, 8, head_dim).bfloat16()
    k, v = (torch.randn(6, 16, 2, head_dim).to(kv_dtype) for _ in range(2))
    table = torch.tensor([[3, page, 5, *[1] * 6], [0, 4, *[-9] * 7]], dtype=torch.int32)
    used = torch.tensor([length, 17], dtype=torch.int32)
    with simulate(edit=edit):
        return flash_attn_func(q, k, v, page_table=table, seqused_k=used, num_splits=1)


LOADS = [
    (1, torch.bfloat16, 128, "cp.async"),
    (20, torch.bfloat16, 128, "cp.async"),
    (20, torch.float8_e4m3fn, 64, "ld.global.v4"),
]
PAGES_OUT_OF_RANGE = [1_000_000, 6, -1]


def unclamped(ptx: str) -> str:
    changed, count = re.subn(r"min\.relu\.s32\s+(%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", ptx)
    assert count
    return changed


@pytest.mark.parametrize("rows, kv_dtype, head_dim, load", LOADS)
@pytest.mark.parametrize("page", PAGES_OUT_OF_RANGE)
def test_page_number_out_of_range(page, rows, kv_dtype, head_dim, load):
    """The kernel keeps it inside the pool; without that the checker sees where it leads."""
    paged(None, page, rows, kv_dtype, head_dim=head_dim)
    with pytest.raises(SimulationError) as caught:
        paged(unclamped, page, rows, kv_dtype, head_dim=head_dim)
    report = caught.value.report
    assert report.kind == "out-of-bounds global access" and load in report.ptx_text
    assert report.cta is not None and report.warp is not None and report.lane is not None


@pytest.mark.parametrize("page", PAGES_OUT_OF_RANGE)
def test_page_number_out_of_range_of_a_tensor_map(page):
    """TMA reads nothing outside; that the kernel keeps the number inside shows in the result."""
    own = (20, torch.float8_e4m3fn)
    inside = paged(None, min(max(page, 0), 5), *own)
    assert torch.equal(paged(None, page, *own), inside)
    assert not torch.equal(paged(unclamped, page, *own), inside)


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_converted_tile_that_is_stored_too_early(head_dim, number):
    """The loading warps don't wait until the matrix warps have given the tile of 8-bit K, or V, before it back; or, at
    head_dim 128, until it is free and until its bytes are there."""

    def edit(ptx: str) -> str:
        wait = list(re.finditer(r"mbarrier\.try_wait\.parity[^;]*;", ptx))[number]
        return ptx[: wait.start()] + "setp.eq.b32 P1, 0, 0;" + ptx[wait.end() :]

    with pytest.raises(SimulationError) as caught:
        paged(edit, 0, 20, torch.float8_e4m3fn, 140, head_dim)  # more tiles than there is room for
    # a tile that is full twice before anybody has seen it is one that the matrix warps wait for in vain
    assert caught.value.report.kind in ("shared-memory race", "deadlock", "read of unwritten shared memory")


@pytest.mark.parametrize("tma_strides", [False, True])
def test_python_line_of_a_kernel_that_was_compiled_without(tma_strides):
    """A launcher gets a v of too few pages, as nothing checks it there; with an edit, lines are in the PTX itself."""
    problem = AttentionProblem("bfloat16", 64, 64, softcap=True, page_size=16, seqused_k=True, tma_strides=tma_strides)
    reports = []
    for edit in (None, lambda ptx: ptx):
        q, k, v = (torch.ones(*shape, 2, 64).bfloat16() for shape in ((1, 40), (4, 16), (2, 16)))
        lengths = Lengths(seqused_k=torch.tensor([64], dtype=torch.int32), page_table=torch.arange(4).int()[None])
        given = Arguments(q, k, v, torch.empty_like(q), None, lengths, numbers=Numbers(1.0, 2.0))
        with simulate(edit=edit), pytest.raises(SimulationError) as caught:
            load(problem)(*given)
        reports.append(caught.value.report)
    found, expected = reports
    file, line = expected.source.rsplit(":", 1)
    assert "flash_attn_sm120/device" in file and int(line) > 0
    assert found == replace(expected, ptx_line=found.ptx_line, ptx_text=found.ptx_text, address=found.address)
    assert found.ptx_text.split()[0] == expected.ptx_text.split()[0]
