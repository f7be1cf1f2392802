"""Kernels that are not ours give right results: the interpreter isn't fitted to one kernel."""

import pytest
import torch

pytest.importorskip("cutlass")
import simulator_kernels as kernels

from flash_attn_sm120 import simulator


@pytest.mark.parametrize("dtype", ["BFloat16", "Float16"])
@pytest.mark.parametrize("m, n, k", [(64, 64, 32), (1, 2, 8), (127, 66, 200), (300, 130, 1000)])
def test_matrix_product(dtype, m, n, k):
    kind = {"BFloat16": torch.bfloat16, "Float16": torch.float16}[dtype]
    a, b = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
    c = torch.full((m, n), float("nan"))
    with simulator.simulate() as run:
        simulator.launch(kernels.matrix_product(dtype), (a, b, c))
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)
    assert len(run.launches) == 1


@pytest.mark.parametrize("batch_warps", [4, 12, 256])
def test_batches_do_not_change_the_result(batch_warps):
    a, b = torch.randn(200, 64).bfloat16(), torch.randn(140, 64).bfloat16()
    results = []
    for warps in (batch_warps, 64):
        c = torch.full((200, 140), float("nan"))
        with simulator.simulate(batch_warps=warps):
            simulator.launch(kernels.matrix_product(), (a, b, c))
        results.append(c)
    assert torch.equal(*results)


@pytest.mark.parametrize("swizzle", [1, 2, 3])
@pytest.mark.parametrize("rows, cols", [(32, 64), (70, 200), (5, 8), (33, 136)])
def test_tensor_copy(swizzle, rows, cols):
    source = torch.randn(rows, cols).bfloat16()
    out = torch.full_like(source, float("nan"))
    with simulator.simulate():
        simulator.launch(kernels.tensor_copy(swizzle), (source, out))
    assert torch.equal(out, source * 2)


def test_strided_tensors():
    wide = torch.randn(100, 256).bfloat16()
    a, b = wide[:, :64], wide[:70, 128:192]
    c = torch.full((100, 80), float("nan"))[:, :70]
    with simulator.simulate():
        simulator.launch(kernels.matrix_product(), (a, b, c))
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)
