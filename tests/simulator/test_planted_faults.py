"""Each fault is planted by editing PTX; the checker must name it, and where it is."""

import re

import pytest
import torch

pytest.importorskip("cutlass")
import simulator_kernels as kernels

from flash_attn_sm120 import simulator
from flash_attn_sm120.simulator import SimulationError


def replace(pattern: str, text: str, count: int = 0):
    """An edit of PTX that must change something."""

    def edit(ptx: str) -> str:
        edited, times = re.subn(pattern, text, ptx, count=count)
        assert times, f"{pattern} isn't in the PTX"
        return edited

    return edit


def product_fault(edit, m=100, n=72, k=128):
    """The report on an edited matrix product."""
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), float("nan"))
    with simulator.simulate(edit=edit), pytest.raises(SimulationError) as caught:
        simulator.launch(kernels.matrix_product(), (a, b, c), names=("A", "B", "C"), outputs={"C": c})
    return caught.value.report


def copy_fault(edit, rows=40, cols=300):
    """The report on an edited tensor copy."""
    source = torch.randn(rows, cols).bfloat16()[:, :296]
    out = torch.full((rows, 296), float("nan")).bfloat16()
    with simulator.simulate(edit=edit), pytest.raises(SimulationError) as caught:
        simulator.launch(kernels.tensor_copy(), (source.contiguous(), out), names=("input", "out"))
    return caught.value.report


def test_removed_barrier():
    report = product_fault(replace(r"bar\.sync\s+0;", ""))
    assert report.kind == "shared-memory race" and "cp.async of warp" in report.message
    assert "ldmatrix" in report.ptx_text and report.warp is not None and report.lane is not None


def test_removed_wait_for_cp_async():
    report = product_fault(replace(r"cp\.async\.wait_group\s+\d+;", ""))
    assert report.kind == "shared-memory race" and "cp.async" in report.message


def test_wait_that_leaves_one_group_too_many():
    report = product_fault(replace(r"cp\.async\.wait_group\s+1;", "cp.async.wait_group 2;"))
    assert report.kind == "shared-memory race"


def test_unpredicated_ragged_load():
    report = product_fault(replace(r"(cp\.async\.c[ag]\.shared\.global[^;]*, 16), %r\d+;", r"\1;"), m=100)
    assert report.kind == "out-of-bounds global access"
    assert "past the end of A" in report.tensor and "cp.async" in report.ptx_text


def test_mask_off_by_one():
    report = product_fault(replace(r"setp\.ge\.s32", "setp.gt.s32"), m=64, n=72)
    assert report.kind in ("out-of-bounds global access", "global-memory race")


def test_unwritten_output():
    report = product_fault(replace(r"st\.global\.b32[^;]*;", "", count=1))
    assert report.kind == "unwritten output" and report.tensor.startswith("C[")


def test_divergent_barrier():
    skip = "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 q, t, 37; @q bra OVER; bar.sync 0; OVER: }"
    report = product_fault(replace(r"bar\.sync\s+0;", skip))
    assert report.kind == "divergent barrier" and (report.warp, report.lane) == (1, 5)


def test_barrier_that_one_warp_misses():
    skip = "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 q, t, 32; @q bra OVER; bar.sync 0; OVER: }"
    assert product_fault(replace(r"bar\.sync\s+0;", skip)).kind == "shared-memory race"


def test_misaligned_store():
    report = product_fault(replace(r"(st\.global\.b32\s+\[%rd\d+)(?:\+\d+)?\]", r"\1+2]", count=1))
    assert report.kind == "misaligned access" and "4-byte" in report.message


def test_read_of_shared_memory_that_nothing_wrote():
    report = product_fault(replace(r"(?m)^\s*cp\.async\.c[ag]\.shared[^;]*;", "", count=1))
    assert report.kind in ("read of unwritten memory", "shared-memory race")


@pytest.mark.parametrize("role", [0, -1], ids=["producer", "consumer"])
def test_mbarrier_with_wrong_parity(role):
    def edit(ptx: str) -> str:
        wait = list(re.finditer(r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\], (%r\d+)", ptx))[role]
        at, parity = ptx.rindex("{", 0, wait.start()), wait.group(1)
        return ptx[:at] + f"xor.b32 {parity}, {parity}, 1;\n" + ptx[at:]

    report = copy_fault(edit)
    # Whether the wrong phase is over or never comes depends on who is first.
    assert report.kind in ("read of unwritten memory", "shared-memory race", "deadlock")
    if report.kind == "deadlock":
        assert "mbarrier.try_wait" in report.ptx_text


def test_mbarrier_that_awaits_too_many_bytes():
    report = copy_fault(replace(r"mov\.b32\s+(%r\d+), 4096;", r"mov.b32 \1, 4112;"))
    assert report.kind == "deadlock" and "mbarrier.try_wait" in report.ptx_text


def test_mbarrier_used_before_its_initialisation_is_ordered():
    assert "initialisation" in copy_fault(replace(r"bar\.sync\s+0;", "")).message


def test_removed_wait_for_tensor_store():
    report = copy_fault(replace(r"cp\.async\.bulk\.wait_group\.read\s+0;", ""))
    assert report.kind == "shared-memory race" and "bulk store" in report.message


def test_removed_proxy_fence():
    report = copy_fault(replace(r"fence\.proxy\.async[^;]*;", ""))
    assert report.kind == "missing proxy fence" and "cp.async.bulk.tensor" in report.ptx_text


def test_removed_wait_for_free_stage():
    # The producer overwrites a stage that the consumer may still read.
    def edit(ptx: str) -> str:
        return re.sub(r"mbarrier\.try_wait\.parity[^;]*;", "setp.eq.b32 P1, 0, 0;", ptx, count=1)

    assert copy_fault(edit).kind == "shared-memory race"


def test_unknown_instruction_raises_with_its_text():
    a, b, c = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16(), torch.empty(64, 64)
    edit = replace(r"bar\.sync\s+0;", "frobnicate.b32 %r1, %r2;")
    with simulator.simulate(edit=edit), pytest.raises(simulator.UnsupportedInstruction, match=r"frobnicate\.b32 %r1"):
        simulator.launch(kernels.matrix_product(), (a, b, c))
