"""The simulate() block, launch() and what a report says."""

import pytest
import torch

pytest.importorskip("cutlass")
import simulator_kernels as kernels

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, reference, simulator


def inputs(dtype=torch.bfloat16, seqlen_q=70, seqlen_k=90):
    q = torch.randn(2, seqlen_q, 4, 64).to(dtype)
    k, v = (torch.randn(2, seqlen_k, 2, 64).to(dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
def test_public_function_takes_cpu_tensors(arch):
    q, k, v = inputs()
    with simulator.simulate(arch) as run:
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    exact, exact_lse = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(out.float(), exact.float(), atol=0.0156, rtol=0)
    torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-5)
    assert len(run.launches) == 1 and run.seconds > 0 and run.arch == arch


def test_packed_sequences():
    q, k, v = (x.flatten(0, 1) for x in inputs(torch.float16))
    marks_q, marks_k = torch.tensor([0, 1, 50, 140]).int(), torch.tensor([0, 100, 101, 180]).int()
    lengths = {"cu_seqlens_q": marks_q, "cu_seqlens_k": marks_k}
    with simulator.simulate():
        out = flash_attn_varlen_func(q, k, v, **lengths, max_seqlen_q=90, max_seqlen_k=100)
    exact, _ = reference.attention(q, k, v, **lengths)
    torch.testing.assert_close(out.float(), exact.float(), atol=0.0156, rtol=0)


def test_packed_projection():
    """q, k and v as columns of one tensor: their spans interleave, and each is known by its own name."""
    qkv = torch.randn(2, 50, 3, 2, 64).bfloat16()
    q, k, v = qkv.unbind(2)
    with simulator.simulate():
        out = flash_attn_func(q, k, v)
    exact, _ = reference.attention(q, k, v)
    torch.testing.assert_close(out.float(), exact.float(), atol=0.0156, rtol=0)


def test_runs_are_equal_bit_by_bit():
    q, k, v = inputs()
    with simulator.simulate(batch_warps=8):
        one = flash_attn_func(q, k, v)
    with simulator.simulate(batch_warps=512):
        two = flash_attn_func(q, k, v)
    assert torch.equal(one, two)


def test_outside_the_block_a_cpu_tensor_is_refused():
    with simulator.simulate():
        assert simulator.active().arch == "sm_120a"
        with simulator.simulate("sm_121a") as inner:
            assert simulator.active() is inner
    assert simulator.active() is None
    with pytest.raises((TypeError, ValueError), match="simulate"):
        flash_attn_func(*inputs())


def test_unknown_arch():
    with pytest.raises(ValueError, match="arch"), simulator.simulate("sm_90a"):
        pass


def test_host_code_refuses_what_it_would_refuse_on_a_gpu():
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).half()
    with pytest.raises((TypeError, ValueError), match="dtype"):
        simulator.launch(kernels.matrix_product(), (a, b, torch.empty(64, 64)))


def test_artifact_without_ptx():
    class Nothing:
        ir_module, artifacts = None, None

    with pytest.raises(ValueError, match="keep-ptx"):
        simulator.launch(Nothing(), ())


def test_report_names_everything():
    a, b = torch.randn(70, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    c = torch.full((70, 64), float("nan"))

    def edit(ptx: str) -> str:
        return ptx.replace("bar.sync", "// bar.sync")

    with simulator.simulate(edit=edit), pytest.raises(simulator.SimulationError) as caught:
        simulator.launch(kernels.matrix_product(), (a, b, c), names=("A", "B", "C"))
    text, report = str(caught.value), caught.value.report
    assert "MatrixProduct" in report.kernel and report.source.split(":")[0].endswith("simulator_kernels.py")
    for part in (
        "shared-memory race",
        "kernel:",
        f"PTX line {report.ptx_line}: ldmatrix",
        "Python:",
        "CTA (",
        "warp",
        "lane",
    ):
        assert part in text
